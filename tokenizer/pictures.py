"""Pictures that show what a tokenizer does."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mutor_img.common.images import grid_picture


def before_after(images: np.ndarray, reconstructions: np.ndarray, columns: int = 10) -> Image.Image:
    """Return images and, below each, its reconstruction; both (B, H, W, 3) uint8, small ones magnified."""
    rows, names = [], []
    for first in range(0, len(images), columns):
        rows += [images[first: first + columns], reconstructions[first: first + columns]]
        names += ["before", "after"]
    short = columns - len(rows[-1]) if len(images) > columns else 0
    if short:  # the last pair of rows is filled with white, so that each row begins where it should
        white = np.full((short, *images.shape[1:]), 255, np.uint8)
        rows[-2:] = [np.concatenate([row, white]) for row in rows[-2:]]
    return grid_picture(np.concatenate(rows), min(columns, len(images)), row_names=names,
                        scale=magnification(images.shape[1]))


def magnification(side: int) -> int:
    """Return the whole-number scale at which images of ``side`` pixels are large enough to look at."""
    return max(1, 64 // side)
