"""Images from a generator and its tokenizer, in memory: batches, and grids with one class per row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mutor_img.blocks import ModelConfig
from mutor_img.common.errors import UserError, naming
from mutor_img.common.hub import is_hub_name
from mutor_img.common.images import grid_picture, shrink, to_nhwc, write_png
from mutor_img.decoding.drafting import NO_DRAFT, Draft
from mutor_img.decoding.sampler import Sampler, SamplingSettings, generate_samples
from mutor_img.sampling.labels import readable_names
from mutor_img.transformer import Transformer
from tokenizer.loading import load_tokenizer
from tokenizer.network.interface import ImageTokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

DECODE = 64  # images the tokenizer decodes at a time; at full resolution they take far more memory than the codes
TRAINING_BATCH = 16  # images at a time of a picture amid training, on GPUs
FRAMES = 8  # moments of an image that a strip shows
GREY = 128  # cells whose codes are still to come
PUT_BACK = "put it back there, or encode the images again"  # what a training run can do about a tokenizer


def sample_images(model: Transformer, tokenizer: ImageTokenizer, labels: Tensor, samples: Tensor,
                  settings: SamplingSettings, keep: bool = True) -> np.ndarray:
    """Sample one image a label.

    Args:
        model, tokenizer: on one device.
        labels: (B,) int64.
        samples: (B,) int64 sample numbers; each has its own random stream, f(settings.seed, number).
        keep: False: nothing is compiled or kept beside the model, for a few images of weights that soon change.

    Returns:
        (B, H, W, 3) uint8.

    Raises:
        UserError: labels or settings out of range.
    """
    sampler = Sampler(model, settings, max(1, len(labels)), keep)
    return decode_images(tokenizer, sampler.generate(labels, samples), model.config.grid)


def decode_images(tokenizer: ImageTokenizer, codes: Tensor, grid: tuple[int, int],
                  side: int | None = None) -> np.ndarray:
    """Return (B, H, W, 3) uint8 images of codes (B, N), shrunk to ``side`` pixels if one is given; grey is repeated."""
    decoded = (tokenizer.decode(part, grid) for part in codes.split(DECODE))
    return np.concatenate([to_nhwc(images if side is None else shrink(images, side)) for images in decoded])


def open_tokenizer(path: str | Path, device: torch.device | str, model: ModelConfig,
                   codes: dict[str, Any], origin: str | Path) -> ImageTokenizer:
    """Load the tokenizer at ``path`` and check that it fits the generator.

    Args:
        path: folder or file.
        device: where its weights go.
        model: the generator's sizes.
        codes: what the generator's run says of its codes; {} where nothing does.
        origin: the generator's path, for errors.

    Raises:
        UserError: no tokenizer there, or one with another vocabulary or grid.
    """
    vq = load_tokenizer(path, device)
    if vq.vocabulary != model.vocabulary:
        raise UserError(f"{path}: has {vq.vocabulary} codes, but {origin} makes {model.vocabulary}; give the "
                        "tokenizer it was trained with")
    size = codes.get("image_size")
    if size is not None:
        with naming(origin):
            grid = vq.grid_for(size)
        if grid != model.grid:
            raise UserError(f"{path}: makes {grid} codes of {size} pixels, but {origin} makes {model.grid}; give the "
                            "tokenizer it was trained with")
    return vq


def verified_tokenizer(codes: dict[str, Any], device: torch.device | str, model: ModelConfig,
                       origin: str | Path, fix: str = "give --tokenizer and its path") -> ImageTokenizer:
    """Load the tokenizer that a generator's run names; arguments as :func:`open_tokenizer`, and what an error advises.

    Raises:
        UserError: it is not named, not there, or not the one that made the codes.
    """
    path = codes.get("tokenizer")
    if not path:
        raise UserError(f"{origin}: does not name its tokenizer; {fix}")
    if not is_hub_name(path) and not Path(path).exists():
        raise UserError(f"{path}: no such file or folder; {origin} names it as its tokenizer; {fix}")
    vq = open_tokenizer(path, device, model, codes, origin)
    if vq.hash != codes.get("tokenizer_hash"):
        raise UserError(f"{path}: its weights have sha256 {vq.hash[:16]}, but the codes of {origin} were made by a "
                        f"tokenizer with {str(codes.get('tokenizer_hash'))[:16]}; {fix}")
    return vq


def class_grid(model: Transformer, tokenizer: ImageTokenizer, classes: Sequence[int], columns: int,
               names: Sequence[str], settings: SamplingSettings, batch: int = DECODE, keep: bool = True,
               draft: Draft = NO_DRAFT) -> Image:
    """Return a picture with a row of ``columns`` samples for each of ``classes`` and the class's name beside it.

    The image in row r, column c is sample number r * columns + c. Small images are magnified. ``batch``, ``keep``
    and ``draft`` are those of :class:`~mutor_img.decoding.sampler.Sampler`.
    """
    labels = torch.tensor(classes).repeat_interleave(columns)  # (rows * columns,)
    sampler = Sampler(model, settings, min(batch, len(labels)), keep, draft)
    images = np.concatenate([decode_images(tokenizer, sampler.generate(labels[part], part), model.config.grid)
                             for part in torch.arange(len(labels)).split(batch)])
    return grid_picture(images, columns, row_names=[names[label] for label in classes])


def steps_strip(model: Transformer, tokenizer: ImageTokenizer, label: int, name: str, settings: SamplingSettings,
                draft: Draft = NO_DRAFT) -> Image:
    """Return a strip of sample number 0 of class ``label`` as its codes arrive, at up to ``FRAMES`` even moments.

    Each frame is the decoder's image of the codes so far, the last one repeated for those to come, whose cells are
    then painted grey. The decoder looks beyond a cell, so that pixels near the border may still change.
    """
    (rows, columns), length = model.config.grid, model.config.length
    codes = generate_samples(model, torch.tensor([label]), torch.tensor([0]), settings, draft)  # (1, N)
    known = torch.tensor(sorted({-(-length * (frame + 1) // FRAMES) for frame in range(FRAMES)}), device=codes.device)
    arrived = torch.arange(length, device=codes.device) < known[:, None]  # (frames, N)
    if settings.kept is not None:
        arrived |= torch.tensor(settings.kept, device=codes.device) >= 0
    images = decode_images(tokenizer, torch.where(arrived, codes, codes[0, known - 1][:, None]), (rows, columns))
    cells = arrived.view(-1, rows, columns).cpu().numpy()
    height, width = images.shape[1] // rows, images.shape[2] // columns
    images[~cells.repeat(height, 1).repeat(width, 2)] = GREY  # (frames, H, W)
    return grid_picture(images, len(known), [f"{count}/{length}" for count in known.tolist()], [name])


def draw_training_grid(model: Transformer, codes: dict[str, Any], pictures: Any, seed: int, path: str | Path) -> None:
    """Write the sample grid of a training run: the first ten classes, a row each, always the same random streams.

    Args:
        model: the transformer being trained, or its average.
        codes: the run's metadata of its codes.
        pictures: ``cfg_scale`` and ``per_class``.
        seed: the run's seed.
        path: the PNG.

    Raises:
        UserError: the tokenizer that made the codes is gone or another.
    """
    tokenizer = verified_tokenizer(codes, model.output.weight.device, model.config, "the run", PUT_BACK)
    settings = SamplingSettings(cfg_scale=pictures.cfg_scale, seed=seed)
    classes = range(min(10, model.config.classes))
    names = readable_names(codes.get("class_names"), model.config.classes)
    # Little memory, and none of it for longer than the picture: training needs it.
    write_png(path, class_grid(model, tokenizer, list(classes), pictures.per_class, names, settings, TRAINING_BATCH,
                               keep=False))
