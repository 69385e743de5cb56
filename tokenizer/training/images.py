"""Images for training the tokenizer: global sample numbers in, augmented pixels out.

What a sample is - which image, mirrored or not, cropped where - is a function of (seed, sample number), so that it is
the same after a resume and on any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from mutor_img.common.errors import reading
from mutor_img.common.streams import Stream, uniform
from mutor_img.data.order import StatelessOrder
from mutor_img.training.hardware import to_device
from tokenizer.images.crops import center_crop, center_rule, pil_mode, pixels, random_crop, read_squares, to_float
from tokenizer.images.source import ImageSource

_CACHE_BYTES = 2**30  # folders whose cropped pixels take up to 1 GiB are read once and kept


class TrainingImages:
    """The samples of a run.

    Args:
        folder: the images.
        channels: 1 or 3.
        image_size: pixels per side.
        seed: the run's seed.
        mirror: flip each sample with probability 1/2.
        crop_min: smallest share of the shorter side that a random crop keeps; 1: the centre crop, always.
        workers: reading threads, where the images do not fit in memory or are cropped at random.
        global_batch: samples per update.
        share: those of one process, by which ``global_batch`` divides.
    """

    def __init__(self, folder: ImageSource, channels: int, image_size: int, *, seed: int, mirror: bool,
                 crop_min: float, workers: int, global_batch: int, share: int):
        self.folder, self.channels, self.image_size, self.seed = folder, channels, image_size, seed
        self.mirror, self.crop_min = mirror, crop_min
        self.share, self.others = share, global_batch - share
        self.order = StatelessOrder(len(folder), seed)
        self.pool = ThreadPoolExecutor(workers)
        self.ahead: dict[int, Future[Tensor]] = {}
        self.cache: Tensor | None = None
        if crop_min == 1 and len(folder) * channels * image_size**2 <= _CACHE_BYTES:
            self.cache = read_all(folder, range(len(folder)), channels, image_size, self.pool)

    def batch(self, samples: Tensor, device: torch.device | str = "cpu", ahead: bool = True) -> Tensor:
        """Return the pixels of global sample numbers: (b,) int64 on the CPU -> (b, C, H, W) fp32 in [-1, 1].

        Args:
            samples: the numbers.
            device: where the pixels go.
            ahead: begin to read what this process trains on next.

        Raises:
            UserError: an image cannot be read.
        """
        if self.cache is not None:
            images = self.cache[torch.from_numpy(self.order.items(samples.numpy()))]
        else:
            images = torch.stack(self._read(samples.tolist(), ahead))  # (b, C, H, W) uint8
        if self.mirror:
            flipped = uniform(self.seed, Stream.AUGMENT, samples, 0) < 0.5  # (b,)
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        return to_float(to_device(images, device))

    def _read(self, samples: list[int], ahead: bool) -> list[Tensor]:
        ready = [self.ahead.pop(sample, None) or self._submit(sample) for sample in samples]
        if ahead:
            update_ends = samples[-1] % self.share == self.share - 1
            stride = len(samples) + (self.others if update_ends else 0)
            self.ahead = {sample + stride: self.ahead.get(sample + stride) or self._submit(sample + stride)
                          for sample in samples}
        return [future.result() for future in ready]

    def _submit(self, sample: int) -> Future[Tensor]:
        [item] = self.order.items([sample]).tolist()  # here and not in the thread: the order keeps a cache
        return self.pool.submit(self._one, sample, item)

    def _one(self, sample: int, item: int) -> Tensor:
        draws = uniform(self.seed, Stream.AUGMENT, sample, torch.arange(1, 4)).tolist()
        with reading(self.folder.name(item)):
            image = self.folder.read(item, pil_mode(self.channels))
            if self.crop_min == 1:
                return pixels(center_crop(image, self.image_size))
            return pixels(random_crop(image, self.image_size, self.crop_min, tuple(draws)))


def read_all(folder: ImageSource, numbers: Sequence[int], channels: int, image_size: int,
             pool: ThreadPoolExecutor) -> Tensor:
    """Read and centre-crop the images of ``numbers``: (n, C, H, W) uint8.

    Raises:
        UserError: an image cannot be read.
    """
    rule = center_rule()
    found = pool.map(lambda i: read_squares(folder, int(i), channels, image_size, rule)[0], numbers)
    return torch.stack(list(found))
