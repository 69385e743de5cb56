"""Editing with a model as it is: codes of an image are kept outside of a mask, and a class is mixed with another."""

from __future__ import annotations

import dataclasses

import numpy as np
from einops import reduce
from PIL import Image

from mutor_img.common.errors import UserError
from mutor_img.common.images import read_image
from mutor_img.common.processes import from_main
from mutor_img.sampling.source import SampleSource
from tokenizer.images.crops import pil_mode, pixels, to_float
from tokenizer.network.interface import ImageTokenizer

MASKED = 128  # pixels of a mask from this on are made anew


def check_edit(keep: str | None, mask: str | None, mix_with: object, mix_share: float | None) -> None:
    """Raise :class:`UserError` for a half of what is only meant as a pair."""
    if (keep is None) != (mask is None):
        there, missing = ("--keep", "--mask") if mask is None else ("--mask", "--keep")
        raise UserError(f"{there} does nothing without {missing}; give both, or neither")
    if mix_with is None and mix_share is not None:
        raise UserError("--mix-share does nothing without --mix-with; give a class to mix with, or leave it out")


def edit(source: SampleSource, keep: str | None, mask: str | None, mix_with: int | None,
         mix_share: float | None) -> SampleSource:
    """Return a source of edited images; with nothing but None, the source as it is.

    Args:
        source: what makes them.
        keep, mask: files of :func:`kept_codes`.
        mix_with: a class that every label is mixed with.
        mix_share: its share of the class embedding, in [0, 1]; None: half.

    Raises:
        UserError: one of a pair without the other, a value out of range, or what :func:`kept_codes` raises.
    """
    check_edit(keep, mask, mix_with, mix_share)
    config, changes = source.loaded.model.config, {}
    if mix_with is not None:
        changes |= {"mix_with": mix_with, "mix_share": 0.5 if mix_share is None else mix_share}
    if keep is not None:
        changes |= {"kept": tuple(from_main(lambda: kept_codes(source.tokenizer, config.grid, keep, mask)))}
    settings = dataclasses.replace(source.settings, **changes)
    settings.validate(config)
    return dataclasses.replace(source, settings=settings, kept_from=None if keep is None else (keep, mask))


def kept_codes(tokenizer: ImageTokenizer, grid: tuple[int, int], image: str, mask: str) -> tuple[int, ...]:
    """Return the codes (N) of an image, -1 in every cell where the mask has a white pixel.

    Args:
        tokenizer: encodes the whole image: a code near the mask knows something of what is below it.
        grid: rows and columns of codes.
        image: file of the size that the model makes.
        mask: file of the same size; white where the image is made anew, black where it is kept.

    Raises:
        UserError: a file that is no image or of another size, or a mask that covers nothing, or everything.
    """
    height, width = (cells * tokenizer.downsample for cells in grid)
    picture = _read(image, pil_mode(tokenizer.image_channels), (width, height), "the model makes images")
    covers = np.asarray(_read(mask, "L", (width, height), f"{image} is")) >= MASKED  # (H, W)
    hidden = reduce(covers, "(rows h) (columns w) -> (rows columns)", "max", rows=grid[0], columns=grid[1])  # (N,)
    if not hidden.any():
        raise UserError(f"{mask}: has no white pixel, so nothing would be sampled; paint white what is to be sampled")
    if hidden.all():
        raise UserError(f"{mask}: covers every cell of {image}, so nothing is kept; leave --keep and --mask out, "
                        "or paint black what is to stay")
    [codes] = tokenizer.encode(to_float(pixels(picture))[None]).tolist()
    return tuple(-1 if anew else code for anew, code in zip(hidden.tolist(), codes))


def _read(path: str, mode: str, size: tuple[int, int], like: str) -> Image.Image:
    """Return an image of that size, (width, height) in pixels."""
    image = read_image(path, mode)
    if image.size != size:
        raise UserError(f"{path}: is {image.width} x {image.height} pixels, but {like} of {size[0]} x {size[1]}; "
                        "resize or crop it first")
    return image
