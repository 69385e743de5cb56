"""Files that are whole or absent: every write goes aside, is flushed to disk, and is then renamed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from mutor_img.common.errors import UserError

_SYNCFS = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)  # Linux
PATIENCE = 90.0  # seconds; a network file system may show another machine's file a minute late (NFS: acdirmax)
SEAL = "seal"  # the key of a hash in a JSON file
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of Lustre without -o flock, of NFS without lockd
_MEND = "correct or remove that line"
_stuck: set[Path] = set()  # what could not be removed and has been said


def write_atomic(path: str | os.PathLike, write: Callable[[Path], None]) -> Path:
    """Call ``write(aside)``, flush, and rename ``aside`` to ``path``; nothing is left behind on an error.

    For outputs that this process owns: ``aside`` has the same name each time, so that what a kill leaves of it goes
    when the same command runs again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    try:
        write(aside)
        flush(aside)
        os.replace(aside, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails doesn't name its file
        raise
    finally:
        remove(aside)
    return path


def flush(path: str | os.PathLike) -> None:
    """Make a file or a folder's entries durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike, value: Any) -> Path:
    """Write JSON that a person can read, atomically."""
    return write_atomic(path, lambda aside: aside.write_bytes(json_text(value)))


def json_text(value: Any) -> bytes:
    """Return JSON that a person can read, in UTF-8; names of files that are not in UTF-8 come back as they were.

    What UTF-8 cannot hold becomes an escape of JSON.
    """
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_sealed(path: str | os.PathLike, value: dict[str, Any]) -> Path:
    """Write what :func:`write_json` does, :func:`sealed`."""
    return write_json(path, sealed(value))


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Return JSON values with a seal: a hash of the rest, by which whoever reads them sees damage."""
    value = json.loads(json.dumps(value))  # as it will be read: keys are text, and tuples are lists
    return {**value, SEAL: _seal_of(value)}


def read_json(path: str | os.PathLike) -> Any:
    """Read JSON, as :func:`parse_json` does.

    Raises:
        UserError: the file is missing, is not JSON, or is not what was sealed.
    """
    try:
        return parse_json(Path(path).read_bytes(), path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None


def read_record(path: str | os.PathLike, *keys: str) -> dict[str, Any]:
    """Return a JSON object as :func:`read_json` does, which must have these keys.

    Raises:
        UserError: as there, or it is something else.
    """
    return _with_keys(read_json(path), keys, path)


def _with_keys(value: Any, keys: Collection[str], origin: object,
               advice: str = "remove it to have it made again, or check the path") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{origin}: must be a JSON object; {advice}")
    for key in keys:
        if key not in value:
            raise UserError(f"{origin}: lacks {key!r}; {advice}")
    return value


def parse_json(text: str | bytes, origin: object) -> Any:
    """Return what a JSON text says, without its seal where it has one.

    Raises:
        UserError: it is no JSON, is nested too deeply, holds a number of thousands of digits, or is not what was
            sealed; ``origin`` is named.
    """
    try:
        value = json.loads(text)
        if not isinstance(value, dict) or (
                value.pop(SEAL) == _seal_of(value) if SEAL in value else not _ends_in_a_seal(value)):
            return value
        raise UserError(f"{origin}: damaged, or changed by hand (its {SEAL} does not fit the rest); fetch or make it "
                        f"again, or remove {SEAL!r} from it if the change is yours")
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{origin}: not valid JSON (nested too deeply)") from None
    except ValueError as error:  # of the text's encoding too
        raise UserError(f"{origin}: not valid JSON ({error})") from None


def _ends_in_a_seal(value: dict[str, Any]) -> bool:
    """Tell whether the last value of all is a seal, whose name must then be damaged."""
    *others, last = value or {"": ""}
    found = value.get(last)
    return isinstance(found, str) and len(found) == 64 and found == _seal_of({name: value[name] for name in others})


def _seal_of(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_format(found: object, wanted: str, path: str | os.PathLike) -> None:
    """Check what a file says of its format, a name and a whole number, as in ``mutor_img checkpoint 1``.

    Raises:
        UserError: it is another format, or one of a later version of this project.
    """
    if found == wanted:
        return
    (name, _, number), (other, _, later) = (str(each).rpartition(" ") for each in (wanted, found))
    if other == name and later.isdecimal() and int(later) > int(number):
        raise UserError(f"{path}: has the format {found!r}, and this version of mutor_img reads {wanted!r}; update "
                        "mutor_img")
    raise UserError(f"{path}: its format is {found!r}, not {wanted!r}; check the path")


def append_line(path: str | os.PathLike, line: str) -> None:
    """Append a line to a file, also where several processes do so at once.

    What a killed process, or a full disk, left of a line is cut off first; :func:`read_lines` leaves it out.

    Args:
        path: made where it is not there.
        line: without a line break.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # a disk without locks may hold another process's line by now: mostly it stays
            file.truncate(whole)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: str | os.PathLike, *keys: str) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, each of which must have these keys; [] where there is no file.

    What stands behind the last line break was cut short by a kill, and is left out.

    Raises:
        UserError: a line is no JSON, or no such object; it is named.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    origins = [f"{path}, line {number}" for number in range(1, len(lines) + 1)]
    try:
        values = [parse_json(line, origin) for line, origin in zip(lines, origins)]
    except UserError as error:
        raise UserError(f"{error}; {_MEND}") from None
    return [_with_keys(value, keys, origin, _MEND) for value, origin in zip(values, origins)]


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of a run's ``metrics.jsonl``; a last row that a kill cut short is left out.

    Raises:
        UserError: a row is damaged.
    """
    path = Path(run_dir) / "metrics.jsonl"
    rows = read_lines(path, "step")
    for number, row in enumerate(rows, 1):
        if type(row["step"]) is not int:
            raise UserError(f"{path}, line {number}: its step is no whole number; {_MEND}")
    return rows


def from_above(path: str, origin: str | os.PathLike) -> str:
    """Return where a path leads that a file of ``origin`` names, relative to the folder where that file was made.

    It is searched below the folders above ``origin``, the nearest first; where none has it, the path stays as it is.
    """
    found = next((there for above in Path(origin).absolute().parents if (there := above / path).exists()), None)
    here = found is None or (os.path.exists(path) and os.path.samefile(path, found))
    return path if here else str(found)


def file_hash(path: str | os.PathLike) -> str:
    """Return the sha256 of a file as hexadecimal digits, reading in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: str | os.PathLike) -> tuple[int, int]:
    """Return the size in bytes and the time of the last change, in ns, of a file that is read on and off from now."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def check_stamp(path: str | os.PathLike, seen: tuple[int, int]) -> None:
    """Check that a file is the one of which :func:`stamp` returned ``seen``.

    Where it is memory-mapped, reading beyond its new end would end the process without a word.

    Raises:
        UserError: it is gone, or was changed or replaced.
    """
    try:
        now = stamp(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read any more ({error.strerror}); put it back and run the same command "
                        "again") from None
    if now != seen:
        raise UserError(f"{path}: was changed or replaced while this command read it; put the former file back, or "
                        "make what depends on it again, and run the same command again")


def remove(path: str | os.PathLike) -> bool:
    """Remove a file or a folder with all in it, as far as that is possible; returns whether nothing is there any more.

    What is old must not end what goes on: a folder that another machine still reads (NFS answers "busy"), or that may
    not be removed, is said once and left. Whoever comes by later tries again.
    """
    path = Path(path)
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:  # somebody else removes it, too
        return not os.path.lexists(path)
    except OSError as error:
        _say_stuck(path, error)
        return False
    return True


def clear(path: str | os.PathLike) -> None:
    """Make a name free: remove what is there; what cannot be removed gets a hidden name beside.

    Raises:
        OSError: it can be neither removed nor renamed.
    """
    if not remove(path):
        _set_aside(Path(path))


@contextmanager
def filling(folder: str | os.PathLike) -> Iterator[Path]:
    """Give an empty folder to be filled; on leaving it takes the name ``folder``, or is removed if there was an error.

    What a kill leaves has the same name each time, and goes when the same command runs again.
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.part")
    clear(aside)
    try:
        aside.mkdir(parents=True)
        yield aside
        _flush_disk(aside)  # once for all files: after a power cut, a folder that has its name is whole
        os.replace(aside, folder)
    finally:
        remove(aside)


def discard(path: str | os.PathLike) -> None:
    """Take a folder from its name at once, so that nobody finds half of it there, then :func:`remove` it."""
    try:
        remove(_set_aside(Path(path)))
    except OSError as error:
        _say_stuck(Path(path), error)


def _flush_disk(folder: Path) -> None:
    """Have the file system of a folder write down what it holds in memory: less than a call for each of many files."""
    place = os.open(folder, os.O_RDONLY)
    try:
        if _SYNCFS is None:
            os.sync()
        elif _SYNCFS(place):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(place)


def wait_until_seen(unseen: Callable[[], Path | None], name: str, patience: float | None = None) -> None:
    """Wait until what other processes wrote is seen here.

    Args:
        unseen: returns a file that is not seen yet, or None.
        name: the setting that says where the files are.
        patience: seconds to wait at most; ``PATIENCE`` unless given.

    Raises:
        UserError: it is not seen by then.
    """
    deadline = time.monotonic() + (PATIENCE if patience is None else patience)
    while (path := unseen()) is not None:
        if time.monotonic() > deadline:
            raise UserError(f"{path}: this process does not see what another one wrote; {name} must be on a file "
                            "system that all nodes share")
        time.sleep(0.2)


def _set_aside(path: Path) -> Path:
    """Rename to the first free name of the form ``.name.0.part``; returns it."""
    stem = path.name.removesuffix(".part").removeprefix(".")
    free = next(name for n in count() if not os.path.lexists(name := path.with_name(f".{stem}.{n}.part")))
    os.rename(path, free)
    return free


def _say_stuck(path: Path, error: OSError) -> None:
    if path not in _stuck:
        _stuck.add(path)
        print(f"warning: {path} cannot be removed ({error.strerror or error}); it is left there", file=sys.stderr,
              flush=True)
