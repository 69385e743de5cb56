"""SIGTERM and SIGINT: save, then end with status 0; what has nothing to save ends at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(BaseException):
    """A signal came where there is nothing to save. No ``Exception``: nothing on the way may swallow it."""


class StopRequest:
    """Notes SIGTERM and SIGINT while it is entered; the former handlers come back after."""

    def __init__(self):
        self.seen = False
        self._raising = False
        self._previous = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

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


def end_now(status: int) -> None:
    """End this process without waiting for compilers that work in the background."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
