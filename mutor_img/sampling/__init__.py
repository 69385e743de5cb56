"""From a checkpoint to pictures: ``sample.py``, and the same for callers in Python."""

import mutor_img.common.own_tokenizer  # noqa: F401 (first: what follows imports tokenizer)
from mutor_img.sampling.command import main
from mutor_img.sampling.pictures import class_grid, draw_training_grid, sample_images

__all__ = ["class_grid", "draw_training_grid", "main", "sample_images"]
