"""Full single precision for whatever runs inside, whatever the caller has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch autocast, TF32 and reduced-precision float32 kernels off, and gradients too; restore them after.

    TF32 convolutions move Inception features by 6e-4, a bf16 autocast that leaks in by 1.5e-2.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul,
                torch.backends.mkldnn.conv)
    before = [backend.fp32_precision for backend in backends]
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.no_grad())
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, value in zip(backends, before):
                backend.fp32_precision = value
