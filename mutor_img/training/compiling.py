"""Per-block compilation, and no way out of it unseen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn


def compile_whole(function: Callable, backend: str | Callable = "inductor") -> Callable:
    """Return a function or module compiled for fixed shapes, without graph breaks."""
    return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)


def compile_blocks(blocks: Sequence[nn.Module], backend: str | Callable = "inductor") -> None:
    """Compile each block in place for fixed shapes.

    Blocks share one compilation where nothing but their weights differs. Past a number of them torch would run further
    blocks uncompiled and say so once in a warning: FlexAttention would then build whole matrices of scores. So that is
    an error here, and the number leaves room: stochastic depth is a constant of its own in each block, and training,
    validation and the last, smaller batch of it are graphs of their own.
    """
    settings = torch._dynamo.config
    settings.fail_on_recompile_limit_hit = True
    settings.recompile_limit = max(settings.recompile_limit, 8 + 4 * len(blocks))
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 2 * settings.recompile_limit)
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
