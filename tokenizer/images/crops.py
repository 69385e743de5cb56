"""From an image file to square pixels: crop rules by name, and the random crop of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mutor_img.common.errors import check_range, reading
from mutor_img.common.streams import Stream, uniform
from tokenizer.images.source import ImageSource

VIEWS = {"plain": lambda squares: squares, "mirror": lambda squares: squares.flip(-1)}
_ELONGATED = 200  # sides of an image to each other, at most


@dataclass(frozen=True)
class CropRule:
    """How one image becomes one or more squares.

    Attributes:
        name: the rule with its numbers, as the code store keeps it.
        squares: a name for each square that the rule cuts; one empty name where there is only one.
        cut: (image, pixels per side, image number) -> as many PIL images of that size as there are names. The number
            is what random rules draw by.
        mirrored: mirror images are among the squares already.
    """

    name: str
    squares: tuple[str, ...]
    cut: Callable[[Image.Image, int, int], list[Image.Image]]
    mirrored: bool = False


def shrink(image: Image.Image, side: int) -> Image.Image:
    """Resize so that the shorter side is ``side`` pixels: box halvings while twice too large, then bicubic (ADM).

    Raises:
        ValueError: the longer side would be more than ``_ELONGATED`` times as long, which takes gigabytes.
    """
    if max(image.size) > _ELONGATED * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels: one side is more than {_ELONGATED} times the other")
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


def _center(image: Image.Image, side: int, number: int) -> list[Image.Image]:
    return [center_crop(image, side)]


def _ten(image: Image.Image, side: int, number: int, *, cut: Callable, scale: float) -> list[Image.Image]:
    """Return LlamaGen's ten crops: corners and middle of the centre crop to ``side * scale``, and of its mirror."""
    return list(cut(center_crop(image, int(side * scale)), side))


def _random(image: Image.Image, side: int, number: int, *, least: float, count: int, seed: int) -> list[Image.Image]:
    """Return ``count`` random crops, each mirrored or not: functions of (seed, image number, place in the list)."""
    squares = []
    for view in range(count):
        draws = uniform(seed, Stream.AUGMENT, number, view, torch.arange(4)).tolist()
        square = random_crop(image, side, least, tuple(draws[:3]))
        squares.append(square if draws[3] < 0.5 else square.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    return squares


def center_rule() -> CropRule:
    """Return ADM's centre crop: with its mirror image, the two views of MuToR's recipe."""
    return CropRule("center", ("",), _center)  # functions at module level: reading processes get them by name


def ten_crop_rule(scale: float = 1.1) -> CropRule:
    """Return LlamaGen's ten-crop (its code extraction; scales 1.1 and 1.05): ten views, mirror images among them.

    Args:
        scale: pixels per side of the centre crop that the ten are cut from, in image sizes; 1 to 4.
    """
    check_range("--crop-scale", scale, 1.0, 4.0)
    from torchvision.transforms.functional import ten_crop  # seconds: once, before reading processes are forked

    places = ("top_left", "top_right", "bottom_left", "bottom_right", "center")
    return CropRule(f"ten-crop {scale:g}", (*places, *(f"mirror-{place}" for place in places)),
                    partial(_ten, cut=ten_crop, scale=scale), mirrored=True)


def random_rule(least: float = 0.8, count: int = 10, seed: int = 0) -> CropRule:
    """Return ``count`` random crops, mirrored by draw, as LlamaGen's tokenizer saw its training images.

    Args:
        least: smallest share of the shorter side that a crop keeps, in (0, 1].
        count: views per image.
        seed: of the draws.
    """
    check_range("--crop-min", least, 0.0, 1.0, low_open=True)
    check_range("--num-views", count, 1, 1000)
    return CropRule(f"random {least:g} seed {seed}", tuple(f"random-{view}" for view in range(count)),
                    partial(_random, least=least, count=count, seed=seed), mirrored=True)


CROPS: dict[str, Callable[..., CropRule]] = {"center": center_rule, "ten-crop": ten_crop_rule, "random": random_rule}


def view_names(views: Sequence[str], rule: CropRule) -> tuple[str, ...]:
    """Return a name for each view of an image: every kind of view of every square that the crop rule cuts."""
    if rule.mirrored:
        return rule.squares
    return tuple(f"{view}-{square}" if square else view for view in views for square in rule.squares)


def read_squares(source: ImageSource, index: int, channels: int, side: int, rule: CropRule) -> Tensor:
    """Read and crop one image: (squares, channels, side, side) uint8; colours become PIL's luma for one channel.

    Raises:
        UserError: the image cannot be read or cropped.
    """
    with reading(source.name(index)):
        image = source.read(index, pil_mode(channels))
        return torch.stack([pixels(square) for square in rule.cut(image, side, index)])


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
