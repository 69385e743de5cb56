"""Pictures that show what a tokenizer does."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mutor_img.common.images import grid_picture

COLUMNS = 10


def before_after(images: np.ndarray, reconstructions: np.ndarray) -> Image.Image:
    """Return images and, below each, its reconstruction; both (B, H, W, 3) uint8, small ones magnified."""
    rows, names = [], []
    for first in range(0, len(images), COLUMNS):
        rows += [images[first: first + COLUMNS], reconstructions[first: first + COLUMNS]]
        names += ["before", "after"]
    short = COLUMNS - len(rows[-1]) if len(images) > COLUMNS else 0
    if short:  # the last pair of rows is filled with white, so that each row begins where it should
        white = np.full((short, *images.shape[1:]), 255, np.uint8)
        rows[-2:] = [np.concatenate([row, white]) for row in rows[-2:]]
    return grid_picture(np.concatenate(rows), min(COLUMNS, len(images)), row_names=names)
