"""Pixels: the one rounding rule, reading image files, and pictures of many images."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from mutor_img.common.errors import UserError
from mutor_img.common.files import write_atomic

# What Pillow's decoders raise for a file that is damaged or no image.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error,
           Image.DecompressionBombError)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


def to_uint8(images: Tensor) -> Tensor:
    """Turn pixels in [-1, 1] into uint8: ``floor(clamp(127.5 x + 128, 0, 255))`` in fp32.

    The half that rounds is inside the 128, so nothing is rounded again. Any shape, any float dtype in;
    the same shape in uint8 out. The only such rule in the project (ADM's and LlamaGen's).
    """
    return (images.float() * 127.5 + 128.0).clamp(0, 255).floor().to(torch.uint8)


def to_nhwc(images: Tensor) -> np.ndarray:
    """Turn (B, 1 or 3, H, W) pixels in [-1, 1] into a (B, H, W, 3) uint8 array; grey is repeated."""
    pixels = to_uint8(images).expand(-1, 3, -1, -1)  # (B, 3, H, W)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def shrink(images: Tensor, side: int) -> Tensor:
    """Resize (B, C, H, W) pixels in [-1, 1] to ``side`` pixels a side, before they are rounded; fp32.

    Bicubic without antialiasing, as LlamaGen's sampler makes its 256-pixel images of 384-pixel ones (its
    ``sample_c2i_ddp.py``, ``--image-size-eval``). Values may leave [-1, 1]; :func:`to_uint8` clamps them.
    """
    return F.interpolate(images.float(), size=(side, side), mode="bicubic", align_corners=False)


def read_image(path: str | os.PathLike | BinaryIO, mode: str = "RGB", *, name: str | None = None) -> Image.Image:
    """Open and fully decode one image in PIL ``mode``; ``name`` is what messages call it, its path unless given.

    Raises:
        UserError: the file is missing, is no image, or ends early.
    """
    name = name or str(path)
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except FileNotFoundError:
        raise UserError(f"{name}: no such image file") from None
    except _BROKEN as error:
        # Pillow names the path once more, or the address of a file in memory, which differs from run to run.
        given = path if hasattr(path, "read") else os.fspath(path)
        reason = " ".join(str(error).replace(repr(given), "").split()) or type(error).__name__
        raise UserError(f"{name}: not a readable image ({reason}); replace or remove the file") from None


def check_png(path: str | os.PathLike | None) -> None:
    """Raise :class:`UserError` for a picture's path that does not end in .png; None is no path."""
    if path and Path(path).suffix != ".png":
        raise UserError(f"{path}: must end in .png")


def write_png(path: str | os.PathLike, image: Image.Image) -> Path:
    """Write a PNG under its final name only once it is whole; returns the path."""
    return write_atomic(path, lambda aside: image.save(aside, format="PNG"))


def grid_picture(
    images: np.ndarray,
    columns: int,
    captions: Sequence[str] | None = None,
    row_names: Sequence[str] | None = None,
    scale: int = 1,
) -> Image.Image:
    """Lay (B, H, W, 3) uint8 images out in rows of ``columns``, with a caption below each image.

    Args:
        images: uint8, any count; the last row may be short.
        columns: images a row.
        captions: one text an image, or None for none.
        row_names: one text a row, drawn to its left, or None.
        scale: whole-number magnification without interpolation, for small images.
    """
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = images.shape
    font = ImageFont.load_default(size=11)
    gap, caption_height = 2, 14 if captions else 0
    left = 0 if row_names is None else 6 + int(max(font.getlength(name) for name in row_names))
    rows = -(-count // columns)
    cell_height, cell_width = height + caption_height + gap, width + gap
    sheet = Image.new("RGB", (left + columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = left + gap + column * cell_width, gap + row * cell_height
        sheet.paste(Image.fromarray(images[index]), (x, y))
        if captions:
            draw.text((x, y + height), _shorten(captions[index], font, width), fill="black", font=font)
    for row, name in enumerate(row_names or ()):
        draw.text((3, gap + row * cell_height + height // 2 - 6), name, fill="black", font=font)
    return sheet


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cut a caption to ``width`` pixels, with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
