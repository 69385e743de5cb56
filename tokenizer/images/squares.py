"""Cropped images as a dataset, read in worker processes that need no shared memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mutor_img.common.errors import UserError
from tokenizer.images.crops import CropRule, read_squares
from tokenizer.images.source import ImageSource

_CURE = ("run the same command again with --workers 0 or fewer of them, or allow the container more memory, processes "
         "and open files (docker run --shm-size=1g --memory=8g --pids-limit=-1 --ulimit nofile=65536)")


class Squares(Dataset):
    """The cropped images of some image numbers, read in worker processes; a reading error is data, not a crash."""

    def __init__(self, source: ImageSource, numbers: Sequence[int], channels: int, image_size: int, rule: CropRule):
        self.source, self.numbers, self.channels = source, numbers, channels
        self.image_size, self.rule = image_size, rule

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Return (squares, channels, size, size) uint8 and an empty string, or zeros and what was wrong."""
        try:
            number = int(self.numbers[index])
            return read_squares(self.source, number, self.channels, self.image_size, self.rule), ""
        except UserError as error:
            shape = (len(self.rule.squares), self.channels, self.image_size, self.image_size)
            return torch.zeros(shape, dtype=torch.uint8), str(error)

    def batches(self, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Sequence[str]]]:
        """Yield (B, squares, channels, size, size) uint8 and B reading errors, in order; use it within :func:`readers`.

        Args:
            batch_size: B; the last may be smaller.
            workers: reading processes; 0 reads in this one.

        Raises:
            UserError: the processes cannot be started.
        """
        loader = DataLoader(self, batch_size, num_workers=workers, collate_fn=_collate)
        try:
            _try_queues(workers)
            batches = iter(loader)  # starts the processes
        except OSError as error:
            raise UserError(f"reading processes cannot be started ({error}); {_CURE}") from None
        for squares, errors in batches:
            yield torch.from_numpy(squares), errors


def _try_queues(workers: int) -> None:
    """Make as many queues as a loader will, and some: one that fails half-way prints a traceback of its own later."""
    if workers:
        held = [torch.multiprocessing.Queue() for _ in range(workers + 3)]
        del held


def _collate(items: list[tuple[Tensor, str]]) -> tuple[np.ndarray, list[str]]:
    """Join images in an array: that comes through a pipe. A tensor would take /dev/shm, small in containers."""
    return torch.stack([squares for squares, _ in items]).numpy(), [error for _, error in items]


@contextmanager
def readers() -> Iterator[None]:
    """Say in one line what helps where the system ends a reading process, for want of memory as a rule.

    Its signal may arrive at any line of the block, not only where images are awaited. Also a decorator.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "DataLoader worker (pid" not in text and "Too many open files" not in text:
            raise
        raise UserError(f"the system ended a process that reads images ({text}); {_CURE}") from None
