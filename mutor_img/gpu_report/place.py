"""Where checks run, how they say what is wrong, and what they hold results against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mutor_img.pretraining.parity import Difference, M
from mutor_img.training.compiling import compile_whole
from mutor_img.training.runtime import Runtime


class CheckFailed(Exception):
    """A check found something wrong; the message says what, a line each."""


@dataclass(frozen=True)
class Place:
    """Where checks run.

    Attributes:
        device: the GPU, or a CPU for as much of each check as runs there.
        backend: torch.compile's, for what a check compiles itself.
    """

    device: torch.device
    backend: str = "inductor"

    @property
    def runtime(self) -> Runtime:
        """A process alone on the device."""
        return Runtime(self.device)

    @property
    def on_gpu(self) -> bool:
        """Whether FlexAttention can train here, and decoding replays CUDA graphs."""
        return self.device.type == "cuda"

    def compiled(self, function: Callable) -> Callable:
        """Return the function compiled as training compiles."""
        return compile_whole(function, self.backend)


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of q, k and v in a run of that precision."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def expect(differences: list[Difference]) -> str:
    """Return the worst of the differences in words; raises :class:`CheckFailed` if rounding does not explain all."""
    failed = [str(d) for d in differences if not d.passed]
    if failed:
        raise CheckFailed("\n".join(failed))
    worst = max((d.error / d.allowed for d in differences if d.allowed), default=0.0)
    return f"{len(differences)} tensors, the worst at {worst:.2f} of what rounding allows"


def relative(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    """Return the root mean square of a difference as a share of that of ``scale``; 0 where nothing differs."""
    error, size = ((x.double().square().mean().sqrt().item()) for x in (found.double() - expected.double(), scale))
    return error / size if size else float("inf") if error else 0.0


def in_double(module: M) -> M:
    """Return a copy in float64, every layer of which takes whatever float it is given."""
    wide = copy.deepcopy(module).to(torch.float64)
    for part in wide.modules():
        if not list(part.children()) and isinstance(getattr(part, "weight", None), Tensor):
            part.register_forward_pre_hook(lambda layer, given: tuple(
                x.double() if x.is_floating_point() else x for x in given))
    return wide


def draw_convolutions(network: M, seed: int = 0) -> M:
    """Draw every convolution and matrix so that activations keep scale 1, and images differ in what becomes of them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                part.weight.normal_(0.0, (2 / part.weight[0].numel()) ** 0.5, generator=generator)
                if part.bias is not None:
                    part.bias.normal_(0.0, 0.1, generator=generator)
    return network


@contextmanager
def process_group(device: torch.device) -> Iterator[str]:
    """Join a group of this process alone, NCCL on a GPU and gloo on a CPU; gives the backend's name."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield backend
    finally:
        dist.destroy_process_group()
