"""Image sets seen through others: some of the images, or all of them smaller. Nothing is read until it is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mutor_img.common.errors import UserError
from mutor_img.common.images import shrink, to_uint8
from mutor_img.metrics.image_sets import ImageSet, in_chunks


class _View(ABC):
    """Another image set with its own attributes; it can be read at any place where that one can."""

    def __init__(self, images: ImageSet):
        self.images = images
        if hasattr(images, "read"):
            self.read = self._read

    def __getattr__(self, name: str) -> Any:
        if name in ("images", "read"):
            raise AttributeError(name)
        return getattr(self.images, name)

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[np.ndarray]:
        return in_chunks(self) if hasattr(self, "read") else self._stream()

    @abstractmethod
    def _read(self, start: int, stop: int) -> np.ndarray:
        """Return images ``start`` to ``stop`` - 1; called where the other set can be read at any place."""

    @abstractmethod
    def _stream(self) -> Iterator[np.ndarray]:
        """Yield all images in batches; called where it cannot."""


class Subset(_View):
    """Some images of a set, in its order.

    Args:
        images: the set.
        chosen: ascending numbers (n,) int64 of those that are taken.
    """

    def __init__(self, images: ImageSet, chosen: torch.Tensor):
        super().__init__(images)
        self.chosen = chosen.numpy()
        labels = getattr(images, "labels", None)
        self.labels = None if labels is None else np.asarray(labels)[self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def _read(self, start: int, stop: int) -> np.ndarray:
        numbers = self.chosen[start:stop]
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)  # neighbours are read together
        return np.concatenate([self.images.read(int(run[0]), int(run[-1]) + 1) for run in runs])

    def _stream(self) -> Iterator[np.ndarray]:
        seen, last = 0, None
        for batch in self.images:
            low, high = np.searchsorted(self.chosen, (seen, seen + len(batch)))
            if low < high:
                if last is not None:
                    yield last
                last = np.asarray(batch)[self.chosen[low:high] - seen]
            seen += len(batch)
        if last is not None:
            yield last  # only now: a file's end is where its damage is found


class Resized(_View):
    """Square images shrunk to ``side`` pixels, by :func:`~mutor_img.common.images.shrink` of their 8-bit pixels.

    Raises:
        UserError: they are not square, or smaller than that.
    """

    def __init__(self, images: ImageSet, side: int):
        super().__init__(images)
        height, width = images.size
        if height != width or side > height:
            raise UserError(f"--resize {side}: the images of {images.name} are {width} x {height} pixels; only square "
                            "ones are shrunk, and none is made larger")
        self.size, self.resize = (side, side), side

    def _read(self, start: int, stop: int) -> np.ndarray:
        return self._shrunk(self.images.read(start, stop))

    def _stream(self) -> Iterator[np.ndarray]:
        return map(self._shrunk, self.images)

    def _shrunk(self, batch: np.ndarray) -> np.ndarray:
        if batch.shape[1:3] == self.size:
            return batch
        pixels = torch.from_numpy(np.array(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, C, H, W)
        return to_uint8(shrink(pixels, self.size[0])).permute(0, 2, 3, 1).contiguous().numpy()
