"""SIGTERM and SIGINT: save, then end with status 0; what has nothing to save ends at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mutor_img.training.runtime import Runtime


class Stopped(BaseException):
    """A signal came where there is nothing to save. No ``Exception``: nothing on the way may swallow it."""


class StopRequest:
    """Notes SIGTERM and SIGINT while it is entered; the former handlers come back after."""

    def __init__(self):
        self.seen = False
        self._raising = False
        self._group = None
        self._previous = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def join(self, runtime: Runtime) -> None:
        """Ask all processes of the launch from now on."""
        if runtime.world > 1:  # a CPU group: agreeing must not wait for the GPU
            self._group = dist.new_group(backend="gloo", timeout=runtime.timeout)

    def _note(self, number, frame) -> None:
        self.seen = True
        if self._raising:
            self._raising = False  # once: what unwinds may take a second signal
            raise Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In here a signal raises :class:`Stopped`: building, compiling, evaluating."""
        if self.seen:
            raise Stopped
        self._raising = True
        try:
            yield
        finally:
            self._raising = False

    def requested(self) -> bool:
        """Return whether any process was asked to stop; every process calls this at the same step."""
        if self._group is None:
            return self.seen
        flag = torch.tensor([int(self.seen)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())


def end_now() -> None:
    """End this process with status 0 without waiting for compilers that work in the background."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
