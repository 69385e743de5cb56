"""One thing that is tried, and where it is tried: each part of the suite is a list of these."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from benchmarks.chaos.forks import Forks
from mutor_img.common.cli import one_line


class Fault(Exception):
    """Something happened that the project promises not to let happen."""


class Case(NamedTuple):
    """One trial.

    Attributes:
        name: what is done.
        run: does it, and returns in a few words what came out; raises :class:`Fault`.
    """

    name: str
    run: Callable[[], str]


@dataclass
class Place:
    """What a part is given.

    Attributes:
        folder: an empty folder, which goes afterwards.
        count: how many cases a part draws where it draws them; parts that go through a list ignore it.
        seed: of the draws.
        crowd: seconds that the page's many clients stay.
    """

    folder: Path
    count: int = 100
    seed: int = 0
    crowd: float = 60.0

    @cached_property
    def forks(self) -> Forks:
        """A process that has loaded the project once, and does each trial in a fork of itself."""
        return Forks()

    def draw(self, *keys: object) -> random.Random:
        """Return random numbers that depend on the seed and the keys."""
        return random.Random(repr((self.seed, *keys)))

    def close(self) -> None:
        """End the process that was started."""
        if "forks" in self.__dict__:
            self.forks.close()


def said_no(answer: dict, path: Path | str) -> str:
    """Return the message of a trial that has to end in one line that names the file, or one in that folder.

    Raises:
        Fault: it did something else.
    """
    message = one_line(answer["message"])
    if answer["outcome"] != "refused":
        raise Fault(f"{answer['outcome']}: {message[-300:]}")
    if str(path) not in message:
        raise Fault(f"not a line that names {path}: {message[:300]!r}")
    return message
