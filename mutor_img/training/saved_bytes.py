"""The bytes that autograd keeps for the backward pass, counted on fake tensors: no GPU, and no memory, is needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def autocast_as_trained(device: str, precision: str) -> Iterator[None]:
    """Autocast to bf16 in a bf16 run, as training does; torch.autocast itself refuses CUDA where there is none."""
    torch.set_autocast_enabled(device, precision == "bf16")
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, False)


@contextmanager
def fake_gpu(precision: str) -> Iterator[None]:
    """Make what is built and run within a shape on a GPU, under the run's autocast."""
    with FakeTensorMode(), torch.device("cuda"), autocast_as_trained("cuda", precision):
        yield


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """While this context is open, note what autograd saves: each storage once.

    Args:
        without: tensors whose storages do not count, such as weights.
    """

    def __init__(self, without: Iterable[Tensor]):
        known = {x.untyped_storage()._cdata for x in without}
        kept: dict[int, Tensor] = {}  # kept alive, since the number of a freed storage comes again
        self._kept = kept

        def note(x: Tensor) -> Tensor:
            if x.untyped_storage()._cdata not in known:
                kept.setdefault(x.untyped_storage()._cdata, x)
            return x

        super().__init__(note, lambda x: x)

    def __enter__(self) -> SavedBytes:
        super().__enter__()
        return self

    @property
    def tensors(self) -> list[Tensor]:
        """One tensor of each storage."""
        return list(self._kept.values())

    @property
    def bytes(self) -> int:
        """Bytes of all storages."""
        return sum(x.untyped_storage().nbytes() for x in self._kept.values())
