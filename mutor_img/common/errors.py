"""What a user can get wrong, and how the program says so.

A :class:`UserError` is a mistake that the user can fix. Its message is one line that names the file,
the value and the fix. Commands turn it into that one line on stderr and exit status 2; library callers
may catch it as a ``ValueError``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake of the user's. The message is one line: what is wrong, with its value, and the fix."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word nearest to ``word``, and the known words where they are few.

    Where none is near, all are named.
    """
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    listing = f"known: {', '.join(known)}"
    if not close:
        return f"; {listing}"
    return f"; did you mean {close[0]!r}?" + (f" ({listing})" if len(known) <= 6 else "")


def check_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    """Raise :class:`UserError` unless ``low <= value <= high`` (``low < value`` where ``low_open``).

    NaN is outside of every range.
    """
    above = value > low if low_open else value >= low
    if not (above and value <= high):
        bracket = "(" if low_open else "["
        raise UserError(f"{name} is {value}; give a value in {bracket}{low}, {high}]")


@contextmanager
def naming(origin: object) -> Iterator[None]:
    """Put ``origin``, a file or a key, before the message of a :class:`UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


@contextmanager
def describing(kind: str, origin: object) -> Iterator[None]:
    """Turn whatever is raised while a model is built by the words of a file into an error that names the file.

    Networks raise errors of every kind for a size that is text, or a rate above 1.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{origin}: does not describe a {kind} ({reason})") from None
