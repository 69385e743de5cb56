"""From an image file to square pixels: crop rules by name, and the random crop of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mutor_img.errors import UserError, suggest
from mutor_img.images import read_image


@dataclass(frozen=True)
class CropRule:
    """How one image becomes one or more squares.

    Attributes:
        squares: a name for each square that the rule cuts; one empty name where there is only one.
        cut: (image, pixels a side) -> as many PIL images of that size as there are names.
    """

    squares: tuple[str, ...]
    cut: Callable[[Image.Image, int], list[Image.Image]]


def shrink(image: Image.Image, side: int) -> Image.Image:
    """Resize so that the shorter side is ``side`` pixels: box halvings while twice too large, then bicubic (ADM)."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, side: int) -> Image.Image:
    """Return ADM's centre crop (arXiv 2105.05233, its data loader): shorter side to ``side``, then the middle."""
    image = shrink(image, side)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def random_crop(image: Image.Image, side: int, least: float, draws: tuple[float, float, float]) -> Image.Image:
    """Return a square of at least the share ``least`` of the shorter side (ADM's random crop).

    Args:
        least: in (0, 1]; 1 keeps the whole shorter side.
        draws: uniform numbers in [0, 1) for the size, the row and the column.
    """
    largest = math.ceil(side / least)
    image = shrink(image, side + int(draws[0] * (largest - side + 1)))
    top, left = int(draws[1] * (image.height - side + 1)), int(draws[2] * (image.width - side + 1))
    return image.crop((left, top, left + side, top + side))


def _center(image: Image.Image, side: int) -> list[Image.Image]:
    return [center_crop(image, side)]


CROPS = {"center": CropRule(("",), _center)}  # functions at module level: reading processes get them by name


def crop_rule(name: str) -> CropRule:
    """Return a crop rule by name.

    Raises:
        UserError: the name is unknown; the nearest is named.
    """
    if name not in CROPS:
        raise UserError(f"crop rule {name!r} is unknown{suggest(name, CROPS)}")
    return CROPS[name]


def read_squares(path: Path, channels: int, side: int, rule: CropRule) -> Tensor:
    """Read and crop one file: (squares, channels, side, side) uint8; colours become PIL's luma for one channel.

    Raises:
        UserError: the file cannot be read.
    """
    image = read_image(path, pil_mode(channels))
    return torch.stack([pixels(square) for square in rule.cut(image, side)])


def pil_mode(channels: int) -> str:
    """Return PIL's name for images of 1 or 3 channels."""
    return "L" if channels == 1 else "RGB"


def pixels(image: Image.Image) -> Tensor:
    """Return a PIL image as (channels, height, width) uint8."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def to_float(squares: Tensor) -> Tensor:
    """Turn uint8 pixels into fp32 in [-1, 1]."""
    return squares.float() / 127.5 - 1.0
