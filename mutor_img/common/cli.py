"""What every command shares: option parsing that suggests, and errors as one line with exit status 2."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from mutor_img.common.child import die_with_torchrun
from mutor_img.common.errors import UserError, suggest

N = TypeVar("N", int, float)

_LONGEST = 1000
# No permission, a read-only disk, a file where a path needs a folder or the other way round, links in a circle, and a
# name that is too long.
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP,
           errno.ENAMETOOLONG)


_BROKEN = (errno.EIO, errno.EROFS, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.EREMOTEIO, errno.ETIMEDOUT)


class Parser(argparse.ArgumentParser):
    """``ArgumentParser`` without prefix guessing, whose errors name the nearest valid option.

    ``example`` is printed below the options of ``--help``. A value that begins with ``~`` has the home folder in its
    place, also after ``--flag=``, where shells leave it.
    """

    def __init__(self, *, description: str, example: str, **kwargs):
        super().__init__(
            prog=_as_started(),
            description=description,
            epilog="example:\n  " + example.strip().replace("\n", "\n  "),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """Parse as ``ArgumentParser`` does, once ``~`` is read as the home folder and nothing given is empty."""
        given = sys.argv[1:] if args is None else args
        _refuse_empty(given)
        return super().parse_known_args([_at_home(word) for word in given], namespace)

    def refuse(self, args: argparse.Namespace, names: Iterable[str], why: str) -> None:
        """Raise :class:`UserError` where a flag among ``names`` is not at its default, with ``why`` behind its name."""
        for name in names:
            if getattr(args, name) != self.get_default(name):
                raise UserError(f"--{name.replace('_', '-')} {why}")

    def error(self, message: str):
        """Raise :class:`UserError` in place of argparse's usage dump."""
        unknown = re.match(r"unrecognized arguments: (.*)", message)
        if unknown:
            word = unknown.group(1).split()[0]
            options = [o for action in self._actions for o in action.option_strings if o.startswith("--")]
            hint = suggest(word.split("=")[0], options) if word.startswith("-") else "; options begin with --"
            message = f"unknown argument {word!r}{hint}"
        raise UserError(f"{message} (see --help)")


def _as_started() -> str | None:
    """Return ``python -m MODULE`` where the command was started so; Pythons before 3.14 would say ``MODULE.py``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return None if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Add the default if there is one. 0 is a default too, though it equals False."""
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def _refuse_empty(words: Sequence[str]) -> None:
    """Refuse a flag without a value, as a shell variable that is not set leaves it: a path would be this folder."""
    for before, word in zip(["", *words], words):
        flag = re.fullmatch(r"(--[\w-]+)=", word) or (not word.strip() and re.fullmatch(r"(--[\w-]+)", before))
        if flag:
            raise UserError(f"{flag[1]} is empty; give a value, or leave the flag out")
        if not word.strip():
            raise UserError("an argument is empty; is a variable of the shell not set?")


def _at_home(word: str) -> str:
    """Return an argument with the home folder in place of a ``~`` at the beginning of its value."""
    flag, value = re.fullmatch(r"(--[\w-]+=)?(.*)", word, re.DOTALL).groups()
    return (flag or "") + os.path.expanduser(value)


def parse_grid(text: str, flag: str) -> tuple[int, int]:
    """Return the rows and columns that ``24x24``, or ``24`` for a square, says.

    Raises:
        UserError: it says something else; ``flag`` is what is named.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(re.fullmatch("[0-9]{1,4}", side) and 0 < int(side) <= 1024 for side in sides):
        raise UserError(f"{flag} is {text!r}; give rows x columns of codes, as in 16x16")
    return int(sides[0]), int(sides[-1])


def parse_words(text: str, flag: str) -> list[str]:
    """Return the words of a comma-separated list, without spaces around them.

    Raises:
        UserError: there are none; ``flag`` is what is named.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UserError(f"{flag} is {text!r}; give names with commas between them, or leave it out")
    return words


def parse_numbers(text: str, flag: str, kind: type[N]) -> list[N]:
    """Return the numbers of a comma-separated list, ``int`` or ``float``, all different, in the order given.

    Raises:
        UserError: something else, or a number twice; ``flag`` is what is named.
    """
    try:
        numbers = [kind(word) for word in text.split(",")]
    except ValueError:
        words = "whole numbers with commas between them, as in 1,2,4" if kind is int else (
            "numbers with commas between them, as in 1,1.5,2")
        raise UserError(f"{flag} is {text!r}; give {words}") from None
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{flag} is {text!r}: a number is given twice; give each once")
    return numbers


def run(main: Callable[[Sequence[str]], object], argv: Sequence[str] | None = None) -> None:
    """Run a command's ``main(argv)`` and exit: 0, or 2 with one line on stderr for a user's mistake.

    A full disk is a user's mistake too, and so is a path that may not be read or written. Under a launcher with several
    processes the mistake is the same in each of a machine, so that only the first one there prints it, unless the error
    says of itself who ``speaks``. SIGTERM, and a reader of the output that is gone, unwind as Ctrl-C does: locks
    and half-written files go; training saves first. What the output's encoding cannot hold, as names of files that are
    not UTF-8, is printed as escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    die_with_torchrun()  # before the imports that follow: who is not yet tied to torchrun would wait for it in vain
    try:
        with _sigterm_unwinds(), _bars_vanish():
            main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        _fail(str(error), error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        path = error.filename2 or error.filename  # of a file that is renamed, what it was to become
        if error.errno in _CLOSED and path:
            reason = "a file is where a folder must be" if error.errno == errno.EEXIST else error.strerror
            _fail(f"{path}: {reason}; give another path, or fix this one", error)
        if error.errno in _BROKEN:
            _fail(f"{path or 'a file'}: {error.strerror}; the disk, or the way to it, does not work: mend it and run "
                  "the same command again", error)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(f"no space left on the device while writing {error.filename or 'a file'}; free some and run the "
              "same command again", error)


def _reader_is_gone() -> bool:
    """Return whether what is printed goes into a pipe whose reader has seen enough, as ``head`` has."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # of errors it tells anyway
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Turn SIGTERM into :class:`SystemExit` with the status that a shell reports of it."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    former = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def _bars_vanish() -> Iterator[None]:
    """Take progress bars away when an error comes: they would be drawn once more, behind the line that says why."""
    try:
        yield
    except (Exception, SystemExit):
        if "tqdm" in sys.modules:
            for bar in list(sys.modules["tqdm"].tqdm._instances):
                bar.leave = False
                bar.close()
        raise


def _fail(message: str, error: Exception) -> None:
    first_here = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"  # each machine may have its own fault
    if getattr(error, "speaks", first_here):
        print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    sys.exit(2)


def one_line(message: str) -> str:
    """Return a message as it is printed: one line of at most ``_LONGEST`` characters that a terminal only shows.

    What it quotes may come from a file of megabytes, or hold signs that move a terminal's cursor.
    """
    line = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(message.split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST // 2]} … {line[-_LONGEST // 2 + 3:]}"
