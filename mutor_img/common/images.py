"""Pixels: the one rounding rule, reading image files, and pictures of many images."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from mutor_img.common.errors import UserError, reading
from mutor_img.common.files import write_atomic

LOSSY = "JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"  # Pillow's names
NO_LOSS = ("lossy compression, as of JPEGs, moves features by 5e-3 and with them every score; give PNGs or an npz "
           "written without compression loss")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
# By their content, whatever the name: photographs named .jpg are often something else. The rest of Pillow's formats are
# no photographs, and some start other programs.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "WEBP", "PPM", "TIFF", "GIF", "AVIF", "JPEG2000")
MOST_BYTES = 2**30  # of one image file
MOST_PIXELS = 2**26  # of one image, 8192 x 8192: a file of kilobytes can say that it holds billions
LEGIBLE = 96  # pixels per side: smaller images are magnified in pictures
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # it warns of more than are refused here
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO, _SIGNED = 0, 2  # values of the second and the third


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
    """Resize (B, C, H, W) pixels in [-1, 1] to ``side`` pixels per side, before they are rounded; fp32.

    Bicubic without antialiasing, as LlamaGen's sampler makes its 256-pixel images of 384-pixel ones (its
    ``sample_c2i_ddp.py``, ``--image-size-eval``). Values may leave [-1, 1]; :func:`to_uint8` clamps them.
    """
    return F.interpolate(images.float(), size=(side, side), mode="bicubic", align_corners=False)


def read_image(path: str | os.PathLike | BinaryIO, mode: str = "RGB", *, name: str | None = None,
               lossy: bool = True) -> Image.Image:
    """Open and fully decode one image in PIL ``mode``; ``name`` is what messages call it, its path unless given.

    Where ``lossy`` is false, formats that lose something are refused, whatever the file's name says.

    Transparency is dropped. Pixels of more than 8 bits are scaled by their range (:func:`to_eight_bits`).

    Raises:
        UserError: the file is missing, is no image, ends early, has pixels of an unknown range, or is of a format that
            is refused.
    """
    name = name or str(path)
    with reading(name):
        # In memory, no read can be longer than the file, whatever a length in it says.
        file = path if hasattr(path, "read") else io.BytesIO(_read_file(path, name))
    with reading(name, file), _open(file) as image:
        check_pixels(name, *image.size)
        if not lossy and (image.format in LOSSY or image.info.get("compression") == "jpeg"):  # the latter of a TIFF
            raise UserError(f"{name}: {image.format} by its content; {NO_LOSS}")
        image.load()
        image.info.pop("transparency", None)  # Pillow would look for a colour to keep it in, and warn
        image = to_eight_bits(image)
        if image.mode in ("La", "RGBa"):  # colours multiplied by their opacity
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        elif image.mode == "LAB":
            image = image.convert("RGB")
        return image.convert(mode)


def _open(file: BinaryIO) -> Image.Image:
    """Return an image that is not decoded yet; a PNG's checksums are right: Pillow would decode past wrong ones."""
    image = Image.open(file, formats=_formats())
    if image.format == "PNG":
        image.verify()  # leaves the image unusable
        image = Image.open(file, formats=["PNG"])
    return image


def check_pixels(name: str, width: int, height: int) -> None:
    """Raise :class:`UserError` for an image of more than ``MOST_PIXELS``; ``name`` is what is named."""
    if width * height > MOST_PIXELS:
        raise UserError(f"{name}: {width} x {height} pixels, more than the {MOST_PIXELS} that an image may have; "
                        "shrink or remove it")


def _read_file(path: str | os.PathLike, name: str) -> bytes:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        link = f" (a link to {os.readlink(path)})" if os.path.islink(path) else ""
        raise UserError(f"{name}: no such image file{link}") from None
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
        raise UserError(f"{name}: not a plain file; replace or remove it")
    if status.st_size > MOST_BYTES:
        raise UserError(f"{name}: has {status.st_size} bytes; an image has {MOST_BYTES} at most; shrink or remove it")
    return Path(path).read_bytes()


@cache
def _formats() -> list[str]:
    """Return those of the formats that this Pillow reads."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Return an image whose pixels have more than 8 bits in mode L, scaled by their range; others as they are.

    Whole numbers range over their bits: 16, or what a TIFF says of itself. Floats must lie in [0, 1]. Pillow's own
    conversion clips at 255 instead, which makes almost all pixels white, or black.

    Raises:
        ValueError: whole numbers that are signed or have 32 bits, whose range nothing tells, or floats outside of
            [0, 1].
    """
    tags = getattr(image, "tag_v2", {})
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()) or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("its whole numbers are signed or have 32 bits, and nothing tells their range; save them as 8 "
                         "or 16 bits without a sign")
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values, top = np.asarray(image), 1  # (H, W)
    if image.mode != "F":
        top = 2 ** tags.get(_BITS, (16,))[0] - 1
    elif not (values.min() >= 0 and values.max() <= 1):  # NaN too
        raise ValueError(f"its floats run from {values.min():g} to {values.max():g}; they must lie in [0, 1]")
    share = values.astype(np.float64) / top
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow sees to this for 8 bits only
        share = 1 - share
    return Image.fromarray(np.floor(share * 255 + 0.5).astype(np.uint8))


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
) -> Image.Image:
    """Lay (B, H, W, 3) uint8 images out in rows of ``columns``, with a caption below each image.

    Images of fewer than ``LEGIBLE`` pixels are magnified by a whole number to at most that, without interpolation.

    Args:
        images: uint8, any count; the last row may be short.
        columns: images per row.
        captions: one text per image, or None for none.
        row_names: one text per row, drawn to its left, or None.
    """
    scale = max(1, LEGIBLE // images.shape[1])
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
