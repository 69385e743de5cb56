"""Scalars that a device has computed, on their way to the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Sent:
    """Named scalars that a device has been told to copy to the CPU, once it has computed them.

    :meth:`read` waits until they are there, and not for what the device was told since.
    """

    def __init__(self, values: Mapping[str, float | Tensor]):
        self._values, self._arrival = dict(values), None
        found = {name: value.double() for name, value in values.items() if isinstance(value, Tensor)}
        self._names = tuple(found)
        if found:
            together = torch.stack(list(found.values()))
            self._copy = together.to("cpu", non_blocking=True)  # in pinned memory: nothing waits here
            if together.device.type == "cuda":
                self._arrival = torch.cuda.Event()
                self._arrival.record()

    def read(self) -> dict[str, float]:
        """Return the scalars as numbers."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return {**self._values, **(dict(zip(self._names, self._copy.tolist())) if self._names else {})}


def read_numbers(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Return named scalars as numbers, all that are on the device in one read, which waits for it."""
    return Sent(values).read()
