"""Compilation that is an error where torch would run code uncompiled without saying so."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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


@contextmanager
def compile_settings() -> Iterator[None]:
    """Put torch's settings back at the end, which preparing blocks changes for the whole process."""
    dynamo = torch._dynamo.config
    names = ("fail_on_recompile_limit_hit", "recompile_limit", "accumulated_recompile_limit", "optimize_ddp")
    with dynamo.patch({name: getattr(dynamo, name) for name in names}):
        yield


class Forward:
    """What stands in for a block's ``forward``: a function of the block and its inputs.

    It does not hold the block, which holds it: weights would outlive their last user until Python looks for such
    circles.
    """

    def __init__(self, function: Callable, block: nn.Module):
        self.func, self._block = function, weakref.ref(block)

    def __call__(self, *inputs, **named):
        return self.func(self._block(), *inputs, **named)


def replace_forward(blocks: Sequence[nn.Module], wrap: Callable[[Callable], Callable]) -> None:
    """Replace each block's forward pass by what ``wrap`` makes of it; blocks of one kind share the result.

    Args:
        blocks: changed in place; their classes are not.
        wrap: takes and returns a function of a block and its inputs.
    """
    made: dict[Callable, Callable] = {}
    for block in blocks:
        replaced = vars(block).get("forward")
        function = replaced.func if replaced else type(block).forward
        if function not in made:
            made[function] = wrap(function)
        block.forward = Forward(made[function], block)


def compile_blocks(blocks: Sequence[nn.Module], backend: str | Callable = "inductor") -> None:
    """Compile each block in place for fixed shapes; see :func:`forbid_fallback`."""
    forbid_fallback(len(blocks))
    replace_forward(blocks, lambda function: compile_whole(function, backend))
