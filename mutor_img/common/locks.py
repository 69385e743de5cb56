"""One owner for each output: a hidden file names the process that writes a folder or a file.

The file holds host, process id and the moment that process began (a lease of the library filelock). It goes when the
command ends. One that a killed process left is taken over at once on the same machine, where it can be seen that the
process is gone, also if its number belongs to another one by now. Nothing can be seen of another machine's processes:
an owner touches its file every ``BEAT`` seconds, and counts as gone once it has not for ``SILENCE`` seconds.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from glob import escape
from pathlib import Path
from typing import NamedTuple

import psutil
from filelock import LeaseSettingsMismatch, OwnerRecord, SoftFileLease, Timeout

from mutor_img.common.errors import UserError
from mutor_img.common.files import remove

BEAT, SILENCE = 20.0, 300.0  # seconds; a process may hold Python's lock for a minute while it writes weights
_POLL = 1.0  # seconds between looks at another machine's lock
_UNREADABLE = 5.0  # seconds after which a lock that names nobody is not one that is just being written
_HELD = "MUTOR_IMG_LOCKS"  # in the environment: what this process and those above it hold, so that children inherit it


class Lock(NamedTuple):
    """Where an output's owner is named.

    Attributes:
        output: the folder or file, for messages.
        path: the hidden file.
        keeps: an output that exists already may be complete: the command looks for itself what it still has to write.
    """

    output: Path
    path: Path
    keeps: bool = False


def folder_lock(folder: str | os.PathLike, keeps: bool = False) -> Lock:
    """Return the lock of a folder that fills while a command runs; the lock lies in it."""
    return Lock(Path(folder), Path(folder) / ".lock", keeps)


def file_lock(file: str | os.PathLike | None, keeps: bool = False) -> Lock | None:
    """Return the lock of a file; the lock lies beside it. None has none.

    With ``keeps`` the output may also be a folder that appears when it is whole.

    Raises:
        UserError: the path has no name, as "." has none.
    """
    if not file:
        return None
    path = Path(file)
    if not path.name:
        raise UserError(f"{file}: a folder; give the name of a file")
    return Lock(path, path.with_name(f".{path.name}.lock"), keeps)


def owner_of(lock: Lock) -> str | None:
    """Return who writes an output, as in "process 12 on host a"; None: nobody, as far as can be seen.

    Looks without waiting and changes nothing, so that an owner that died within ``SILENCE`` seconds on another
    machine is still named.
    """
    try:
        touched = lock.path.stat()
    except OSError:
        return None
    owner = _lease(lock).owner if stat.S_ISREG(touched.st_mode) else None
    if owner is None or time.time() - touched.st_mtime > SILENCE:
        return None
    if owner.hostname == _this_host() and (not psutil.pid_exists(owner.pid) or _is_zombie(owner.pid)):
        return None
    return _words(owner)


@contextmanager
def claim(*locks: Lock | None) -> Iterator[None]:
    """Own outputs while inside; what this process or one above it owns already stays theirs. None is skipped.

    So a command learns before its work begins that it could not write down what comes out. An output that ``keeps``
    what is there needs no owner where it cannot be written to. A file system without exclusive files has no owners.

    Raises:
        UserError: another process owns one of them (it is named, with its host), or one cannot be written.
    """
    with ExitStack() as held:
        for lock in filter(None, locks):
            held.enter_context(_claim(lock))
        yield


@contextmanager
def _claim(lock: Lock) -> Iterator[None]:
    folder = lock.path.parent
    if folder != lock.output and lock.output.is_dir() and not lock.keeps:
        raise UserError(f"{lock.output}: is a folder; give the name of a file")
    there = folder.is_dir() if folder == lock.output else os.path.lexists(lock.output)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    lease = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lease = _acquire(lock)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not (lock.keeps and there):
                _check_writable(lock)
        if lease is None:
            yield
            return
        above = os.environ.get(_HELD, "")
        os.environ[_HELD] = f"{above} {lease.token}".strip()
        try:
            yield
        finally:
            os.environ[_HELD] = above
            lease.release()
    finally:
        for path in new:  # what a refused command made; a folder that holds something stays
            with suppress(OSError):
                path.rmdir()


def _check_writable(lock: Lock) -> None:
    """Return if an output can be written to although its lock cannot; raise :class:`UserError` if not."""
    folder = lock.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            return
    except OSError as error:
        at = "" if folder == lock.output else f" in {folder}"
        raise UserError(f"{lock.output}: cannot be written{at} ({error.strerror}); give another path, or make this one "
                        "writable") from None


def _acquire(lock: Lock) -> SoftFileLease | None:
    """Take a lock; None where it is held for this process already, by itself or by one above it.

    Raises:
        UserError: another process holds it.
        OSError: the file cannot be written.
    """
    lease = _lease(lock)
    begun, last = time.monotonic(), None
    while True:
        with suppress(Timeout, LeaseSettingsMismatch):  # the latter: held by a version with another SILENCE
            lease.acquire(timeout=0)
            _clear(lock)
            return lease
        try:
            owner, touched = lease.owner, lock.path.stat().st_mtime_ns
        except FileNotFoundError:  # given back just now
            continue
        if owner is None:
            if time.monotonic() - begun > 2 * _UNREADABLE:
                raise UserError(f"{lock.path}: is not a lock of this program; remove it, or give another output than "
                                f"{lock.output}")
            if time.monotonic() - begun > _UNREADABLE:
                lease.force_break()  # a power cut as it was written
            time.sleep(_POLL / 10)
            continue
        if lease.is_lock_held_by_us or owner.token in os.environ.get(_HELD, "").split():
            return None
        words = f"{lock.output}: {_words(owner)} is writing there"
        alive = UserError(f"{words}; wait until it ends, stop it, or give another output (in a copied folder: remove "
                          f"{lock.path.name})")
        if owner.hostname == _this_host():
            if not psutil.pid_exists(owner.pid):  # it ended just now
                continue
            if _is_zombie(owner.pid) and lease.owner == owner:
                lease.force_break()  # dead, but not yet taken note of by its parent: filelock counts it as alive
                continue
            raise alive
        if last is None:
            print(f"note: {words}, or was when it was killed; waiting up to {SILENCE:.0f} s to see whether it is still "
                  "alive", file=sys.stderr, flush=True)
        elif last != (owner.token, touched):
            raise alive
        elif time.monotonic() - begun > SILENCE + 2 * BEAT:
            raise UserError(f"{words}, or was when it was killed; remove {lock.path} if it is gone")
        last = owner.token, touched
        time.sleep(_POLL)


def _clear(lock: Lock) -> None:
    """Remove what processes left that were killed while they took over a dead one's lock, as filelock names it."""
    for left in lock.path.parent.glob(f"{escape(lock.path.name)}.break.*"):
        breaker = left.name.removeprefix(f"{lock.path.name}.break.").partition(".")[0]
        if breaker.isdecimal() and not psutil.pid_exists(int(breaker)):
            remove(left)


def _lease(lock: Lock) -> SoftFileLease:
    return SoftFileLease(lock.path, lease_duration=SILENCE, heartbeat_interval=BEAT)


def _words(owner: OwnerRecord) -> str:
    host = owner.hostname.partition("?")[0]  # beyond it filelock notes the namespace of process ids
    return f"process {owner.pid} on host {host}"


@cache
def _this_host() -> str:
    """Return this machine's name as a lock says it."""
    with (tempfile.TemporaryDirectory() as folder,
          SoftFileLease(Path(folder) / "lock", lease_duration=SILENCE, heartbeat_interval=BEAT) as lease):
        return lease.owner.hostname


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
