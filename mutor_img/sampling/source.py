"""A generator with all that decides its samples: the images that ``sample.py`` writes and others score as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mutor_img.checkpoints.loading import Loaded
from mutor_img.decoding.drafting import NO_DRAFT, Draft
from mutor_img.decoding.sampler import Sampler, SamplingSettings
from mutor_img.sampling.labels import make_labels
from mutor_img.sampling.pictures import decode_images
from mutor_img.transformer import Transformer
from tokenizer.network.interface import ImageTokenizer


@dataclass(frozen=True)
class SampleSource:
    """A checkpoint opened for sampling.

    Attributes:
        loaded: the generator, and where it came from.
        tokenizer: its tokenizer, on the same device.
        settings: guidance, filtering and seed.
        rule: of the labels, "random" or "balanced".
        classes: labels to choose from; None: all.
        names: a readable name for each class.
        dtype: the generator's, "fp32" or "bf16".
        resize: pixels per side that images are shrunk to before they are rounded; None: as they are decoded.
        draft: how codes are drafted, which changes no image.
        kept_from: the files of the image whose codes ``settings.kept`` holds, and of its mask; None: none are kept.
    """

    loaded: Loaded
    tokenizer: ImageTokenizer
    settings: SamplingSettings
    rule: str
    classes: Sequence[int] | None
    names: Sequence[str]
    dtype: str
    resize: int | None = None
    draft: Draft = NO_DRAFT
    kept_from: tuple[str, str] | None = None

    @property
    def run_names(self) -> list[str] | None:
        """What the run itself calls its classes; None: it does not say."""
        return self.loaded.codes.get("class_names")

    @property
    def device(self) -> torch.device:
        """Where the generator runs."""
        return self.loaded.model.output.weight.device

    def labels(self, count: int) -> Tensor:
        """Return the labels (count,) int64 of samples 0 .. count - 1."""
        classes = self.classes or range(self.loaded.model.config.classes)
        return make_labels(self.rule, classes, count, self.settings.seed)

    def identity(self, count: int) -> dict[str, Any]:
        """Return everything that decides the bytes of the first ``count`` images, as JSON values."""
        return {"weights": self.loaded.which, "weights_hash": self.loaded.weights_hash,
                "tokenizer_hash": self.tokenizer.hash, **self.settings.to_json(), "labels": self.rule,
                "classes": self.classes, "num_samples": count, "dtype": self.dtype, "device": self.device.type,
                **({} if self.loaded.meta else {"grid": list(self.loaded.model.config.grid)}),  # a .pt may not say it
                "resize": self.resize, **({} if self.resize is None else {"resize_rule": RESIZE_RULE})}


RESIZE_RULE = "bicubic, not antialiased, before rounding"  # of common.images.shrink


class ModelImages:
    """The images of a generator in memory as an image set that is made while it is read, and never stored.

    See :mod:`mutor_img.metrics.image_sets` for what an image set is; several processes each make only what they read.

    Attributes:
        name: for results.
        size: (H, W) in pixels.
        labels: (N,) int64.
        manifest: what decides the images, or None.
    """

    warnings: Sequence[str] = ()
    manifest: dict[str, Any] | None = None

    def __init__(self, model: Transformer, tokenizer: ImageTokenizer, labels: Tensor, settings: SamplingSettings,
                 batch: int, name: str, keep: bool = True, resize: int | None = None, draft: Draft = NO_DRAFT):
        """Nothing is sampled yet.

        Args:
            model, tokenizer: on one device.
            labels: (N,) int64 of images 0 .. N - 1.
            settings: guidance, filtering and seed.
            batch, keep, draft: see :class:`~mutor_img.decoding.sampler.Sampler`.
            name: for results.
            resize: pixels per side that images are shrunk to, or None.
        """
        self.model, self.tokenizer, self.settings, self.batch, self.name = model, tokenizer, settings, batch, name
        self.keep, self.resize, self.draft = keep, resize, draft
        self.size = (resize, resize) if resize else tuple(side * tokenizer.downsample for side in model.config.grid)
        self.drawn, self.labels = labels, labels.numpy()

    @cached_property
    def _sampler(self) -> Sampler:
        return Sampler(self.model, self.settings, min(self.batch, len(self)), self.keep, self.draft)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Make images ``start`` to ``stop`` - 1: (stop - start, H, W, 3) uint8."""
        codes = self._sampler.generate(self.drawn[start:stop], torch.arange(start, stop))
        return decode_images(self.tokenizer, codes, self.model.config.grid, self.resize)

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), self.batch):
            yield self.read(start, min(start + self.batch, len(self)))


class GeneratedImages(ModelImages):
    """The first ``count`` images of a source: image i is what ``sample.py`` writes at place i with its settings."""

    def __init__(self, source: SampleSource, count: int, batch: int):
        super().__init__(source.loaded.model, source.tokenizer, source.labels(count), source.settings, batch,
                         str(source.loaded.path), resize=source.resize, draft=source.draft)
        self.class_names = list(source.names)
        self.manifest = {"generated": True, **source.identity(count), **source.draft.to_json()}
