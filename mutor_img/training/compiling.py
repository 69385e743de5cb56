"""Compilation with no way out of it unseen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn


def compile_whole(function: Callable, backend: str | Callable = "inductor") -> Callable:
    """Return a function or module compiled for fixed shapes, without graph breaks."""
    return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)


def forbid_fallback(blocks: int) -> None:
    """Make it an error if any of so many compiled blocks would run uncompiled, for the whole process.

    Blocks share one compilation where nothing but their weights differs. Past a number of compilations torch runs
    further blocks uncompiled and says so once in a warning, and uncompiled FlexAttention builds whole matrices of
    scores. The number leaves room: stochastic depth is a constant of its own in each block, and training, validation
    and the last, smaller batch of it are graphs of their own.
    """
    settings = torch._dynamo.config
    settings.fail_on_recompile_limit_hit = True
    settings.recompile_limit = max(settings.recompile_limit, 8 + 4 * blocks)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 2 * settings.recompile_limit)


def compile_blocks(blocks: Sequence[nn.Module], backend: str | Callable = "inductor") -> None:
    """Compile each block in place for fixed shapes; see :func:`forbid_fallback`."""
    forbid_fallback(len(blocks))
    for block in blocks:
        block.forward = compile_whole(block.forward, backend)
