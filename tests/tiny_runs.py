"""Run folders of tiny models: a tokenizer of 8-pixel images, what a generator's run says of its codes, and its log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mutor_img.checkpoints.folder import write_checkpoint
from mutor_img.common.files import read_metrics
from mutor_img.sampling import main
from mutor_img.training.trainer import Trainer
from mutor_img.transformer import Transformer
from tokenizer import load_tokenizer
from tokenizer.network.vq import VQModel

NAMES = ["cat", "dog", "red fox"]
GREY = {"image_channels": 1, "channels": 8, "multipliers": (1, 2), "blocks": 1, "latent_channels": 8, "code_dim": 4,
        "vocabulary": 11, "groups": 4, "attention": False}


def write_tokenizer(folder: Path, seed: int = 0, image_size: int = 8, **changes) -> VQModel:
    """Write the run folder of a tokenizer with drawn weights, 8 x 8 grey pixels to 4 x 4 codes; returns it loaded."""
    torch.manual_seed(seed)
    vq = VQModel(**{**GREY, **changes})
    write_checkpoint(folder, 1, {"model": vq.state_dict()}, {"kind": "tokenizer", "model": vq.options,
                                                              "image_size": image_size}, 1)
    return load_tokenizer(folder)


def write_generator(folder: Path, model: Transformer, vq: VQModel, **codes) -> str:
    """Write the run folder of a generator that names its tokenizer; returns its path."""
    about = {"tokenizer": vq.path, "tokenizer_hash": vq.hash, "class_names": NAMES, "image_size": 8, **codes}
    write_checkpoint(folder, 3, {"model": model.state_dict()},
                     {"kind": "generator", "model": model.config.to_json(), "codes": about}, 1)
    return str(folder)


def edit_flags(folder: Path, rows: slice = slice(3, 6)) -> list[str]:
    """Write an image of 8 pixels, and a mask that is white in some rows; returns the flags that name them."""
    pixels = np.random.default_rng(7).integers(0, 256, (8, 8), dtype=np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[rows, 5] = 255
    for name, array in (("photo", pixels), ("mask", mask)):
        Image.fromarray(array).save(folder / f"{name}.png")
    return ["--keep", str(folder / "photo.png"), "--mask", str(folder / "mask.png")]


def sample(run: str, out: Path, *flags: str, count: int = 150) -> Path:
    """Write ``count`` samples of a run by ``sample.py``'s code, in this process; returns what was written."""
    return main(["--checkpoint", run, "--out", str(out), "--num-samples", str(count), *flags])


def rows_with(trainer: Trainer, name: str) -> list[float]:
    """Return the values that a run has logged under a name, in order."""
    return [row[name] for row in read_metrics(trainer.run_dir) if name in row]


def shapes(trainer: Trainer) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's weights by their names."""
    return {name: tuple(weight.shape) for name, weight in trainer.model.state_dict().items()}
