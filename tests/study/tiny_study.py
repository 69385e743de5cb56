"""A study small enough for tests: 16-pixel grey images of bars, a drawn tokenizer of 64 codes, the preset mnist."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from tiny_runs import write_tokenizer

from mutor_img.metrics.digits import main as train_classifier
from tokenizer.encode import main as encode

SIDE, CLASSES = 16, 3


def write_bars(folder: Path, count: int, seed: int) -> None:
    """Write an ImageFolder of one bright row each, at a height that is the class."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        label = number % CLASSES
        image = rng.integers(0, 60, (SIDE, SIDE), dtype=np.uint8)
        image[2 + 4 * label:5 + 4 * label, 2:14] = rng.integers(150, 256, (3, 12))
        path = folder / f"bar{label}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def write_inputs(root: Path) -> None:
    """Write what a study reads: images, tokenizer, codes and classifier, below ``root``."""
    for name, count, seed in (("train", 36, 0), ("val", 12, 1)):
        write_bars(root / "images" / name, count, seed)
    write_tokenizer(root / "runs" / "vq", vocabulary=64, multipliers=(1, 1, 2), image_size=SIDE)
    for name, store in (("train", "codes/tiny"), ("val", "codes/tiny_val")):
        encode(["--tokenizer", str(root / "runs" / "vq"), "--images", str(root / "images" / name), "--out",
                str(root / store), "--views", "plain"])
    train_classifier(["--images", str(root / "images" / "train"), "--val", str(root / "images" / "val"), "--out",
                      str(root / "runs" / "classifier"), "--epochs", "1"])
