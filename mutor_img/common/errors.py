"""What a user can get wrong, and how the program says so.

A :class:`UserError` is a mistake that the user can fix. Its message is one line that names the file,
the value and the fix. Commands turn it into that one line on stderr and exit status 2; library callers
may catch it as a ``ValueError``.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake of the user's. The message is one line: what is wrong, with its value, and the fix."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_choice(name: str, value: str, known: Collection[str]) -> None:
    """Raise :class:`UserError` naming the nearest known value unless ``value`` is one of them."""
    if value not in known:
        raise UserError(f"{name} is {value!r}{suggest(value, known)}")


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
def reading(name: object, given: object = None, kind: str = "image",
            cure: str = "replace or remove the file") -> Iterator[None]:
    """Turn whatever is raised while one image, or another file, is read into a :class:`UserError` that names it.

    Decoders raise errors of every kind for damaged files, which no list of kinds has held for long.

    Args:
        name: what messages call the image.
        given: what Pillow was given, which its messages repeat: a file in memory by its address.
        kind: what the file should be.
        cure: what the message advises.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join((reason.replace(repr(given), "") if given else reason).split()) or type(error).__name__
        raise UserError(f"{name}: not a readable {kind} ({reason}); {cure}") from None


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
