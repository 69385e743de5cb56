"""Disks that are full, broken, read-only or slow: every call that writes fails in turn, in commands that write much.

A small library that is loaded before the C library counts the calls below a folder and has one of them fail: with
"no space left" and "read-only" all later ones too, with "input/output error" that one alone. The command has to end in
one line or to go on; what was there before is whole; and the same command, run again, leaves the very files of a run
that nothing disturbed. The same on disks that are full in earnest: a tmpfs of a few pages, which takes root to mount.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import json
import mmap
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos import inputs
from benchmarks.chaos.case import Case, Fault, Place
from benchmarks.chaos.forks import Forks
from mutor_img.checkpoints.folder import newest_checkpoint, newest_intact, read_meta, write_checkpoint
from mutor_img.common import cli
from mutor_img.common.errors import UserError
from mutor_img.sampling.command import main as sample
from tokenizer.encode import main as encode

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
SLOW = 3000  # microseconds that each call takes on a slow disk
PAGES = (1, 2, 4, 8)  # room on a real disk, beyond what is there before the command
_NEW_MOUNTS, _PRIVATE, _REMOUNT = 0x20000, 0x44000, 0x20  # Linux: CLONE_NEWNS, MS_REC | MS_PRIVATE, MS_REMOUNT


def _checkpoint(folder: Path) -> None:
    run = folder / "out"
    meta = read_meta(newest_checkpoint(folder / "generator"))
    meta = {key: meta[key] for key in ("kind", "model", "seconds", "codes")}
    write_checkpoint(run, 3, {"model": {"w": torch.arange(1000.0)}, "optimizer": {"m": torch.ones(1000)}}, meta, 2)


def _encode(folder: Path) -> None:
    encode(["--tokenizer", str(folder / "tokenizer"), "--images", str(folder / "images"), "--workers", "0",
            "--out", str(folder / "out")])


def _sample(folder: Path) -> None:
    sample(["--checkpoint", str(folder / "generator"), "--num-samples", "70", "--device", "cpu",
            "--out", str(folder / "out" / "s.npz")])


COMMANDS: dict[str, Callable[[Path], None]] = {"checkpoint": _checkpoint, "encode": _encode, "sample": _sample}


def attempt(command: str, folder: str, call: int, error: int) -> int:
    """Run a command on a disk that fails from a call on; -1: none does. Returns how many calls there were.

    Runs in a fork.
    """
    torch.set_num_threads(1)
    library = ctypes.CDLL(None)
    library.disk_fails(str(Path(folder) / "out").encode(), call, error, int(error == errno.EIO))
    cli.run(lambda words: COMMANDS[command](Path(folder)), [])
    return library.disk_calls()


def attempt_slow(command: str, folder: str) -> int:
    """Run a command on a disk that takes its time; runs in a fork. Returns how many calls there were."""
    ctypes.CDLL(None).disk_waits(SLOW)
    return attempt(command, folder, -1, 0)


def attempt_small(command: str, folder: str, pages: int) -> dict[str, Any]:
    """Run a command on a disk of so many free pages, and again with room, in a fork that alone sees the disk.

    Returns how the first one ended, as :class:`Forks` says it, what of a file was only half there then, and the hashes
    of all files after the second.
    """
    torch.set_num_threads(1)
    root, out = Path(folder), Path(folder) / "out"
    before = root / "generator" if command == "checkpoint" else None
    sizes = [path.stat().st_size for path in before.rglob("*") if path.is_file()] if before else []
    held = sum(-(-size // mmap.PAGESIZE) for size in sizes)
    out.mkdir()
    _call("unshare", _NEW_MOUNTS)
    _call("mount", b"none", b"/", None, _PRIVATE, None)
    _call("mount", b"tmpfs", bytes(out), b"tmpfs", 0, b"size=%d" % ((held + pages) * mmap.PAGESIZE))
    if before:
        shutil.copytree(before, out, dirs_exist_ok=True)
    printed, ended = io.StringIO(), {"outcome": "returned", "message": ""}
    with redirect_stderr(printed):
        try:
            cli.run(lambda words: COMMANDS[command](root), [])
        except SystemExit as error:
            ended = {"outcome": "ended", "message": f"status {error.code}"}
    at_fault = hashes(out)
    _call("mount", b"tmpfs", bytes(out), b"tmpfs", _REMOUNT, b"size=64m")
    cli.run(lambda words: COMMANDS[command](root), [])
    return {"ended": {**ended, "printed": printed.getvalue()}, "at_fault": at_fault, "after": hashes(out)}


def _call(name: str, *arguments: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)


def prepare(folder: Path) -> None:
    """Write what the commands read, and a run of two checkpoints to which a third is added."""
    vq = inputs.write_tokenizer(folder / "tokenizer")
    inputs.write_generator(folder / "generator", vq)
    inputs.write_images(folder / "images")


def cases(place: Place) -> list[Case]:
    """Return a case for each command, error and call."""
    prepare(place.folder)
    forks, found = place.forks, []
    if not forks.disks_fail:
        raise UserError("gcc is missing, which the part 'disks' compiles its failing disk with; install it")
    for command in COMMANDS:
        begin(command, place.folder)
        answer = forks.run(f"{__name__}:attempt", command, str(place.folder), -1, 0)
        if answer["outcome"] != "returned":
            raise Fault(f"{command}: {answer['message']} {answer['printed']}")
        whole = hashes(place.folder / "out")
        for error in ERRORS:
            for call in range(int(answer["message"])):
                found.append(Case(f"{command}, {errno.errorcode[error]} at call {call}",
                                  lambda a=(command, call, error, whole): _fail(*a, place.folder, forks)))
        found.append(Case(f"{command}, slow", lambda a=(command, whole): _wait(*a, place.folder, forks)))
        for pages in PAGES:
            found.append(Case(f"{command}, {pages} free pages",
                              lambda a=(command, pages, whole): _fill(*a, place.folder, forks)))
    return found


def begin(command: str, folder: Path) -> None:
    """Leave what is there before the command: nothing, or a run of two checkpoints."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    if command == "checkpoint":
        shutil.copytree(folder / "generator", folder / "out")


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder, by its path there."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def _wait(command: str, whole: dict[str, str], folder: Path, forks: Forks) -> str:
    begin(command, folder)
    answer = forks.run(f"{__name__}:attempt_slow", command, str(folder))
    if answer["outcome"] != "returned":
        raise Fault(f"{answer['message']}: {answer['printed'][-300:]}")
    compare(hashes(folder / "out"), whole)
    if command != "checkpoint" and "100%" not in answer["printed"]:
        raise Fault(f"its progress bar ends before its end: {answer['printed'][-300:]}")
    return "the same files"


def _fill(command: str, pages: int, whole: dict[str, str], folder: Path, forks: Forks) -> str:
    shutil.rmtree(folder / "out", ignore_errors=True)
    answer = forks.run(f"{__name__}:attempt_small", command, str(folder), pages)
    if answer["outcome"] == "raised" and answer["message"].startswith("PermissionError"):
        return "skipped: mounting takes root"
    if answer["outcome"] != "returned":
        raise Fault(f"run again with room: {answer['message']}: {answer['printed'][-300:]}")
    found = json.loads(answer["message"])
    _no_halves(found["at_fault"], whole)
    compare(found["after"], whole)
    return _outcome(found["ended"])


def compare(now: dict[str, str], whole: dict[str, str]) -> None:
    """Raise :class:`Fault` where files differ from those of a run that nothing disturbed."""
    if now != whole:
        different = sorted(name for name in {*now, *whole} if now.get(name) != whole.get(name))
        raise Fault(f"it leaves other files: {', '.join(different)}")


def _fail(command: str, call: int, error: int, whole: dict[str, str], folder: Path, forks: Forks) -> str:
    begin(command, folder)
    answer = forks.run(f"{__name__}:attempt", command, str(folder), call, error)
    outcome = _outcome(answer)
    if command == "checkpoint" and (newest := newest_checkpoint(folder / "out")) != newest_intact(folder / "out"):
        raise Fault(f"{newest.name} is not whole")
    _no_halves(hashes(folder / "out"), whole)
    answer = forks.run(f"{__name__}:attempt", command, str(folder), -1, 0)
    if answer["outcome"] != "returned":
        raise Fault(f"run again with room: {answer['message']}: {answer['printed'][-300:]}")
    compare(hashes(folder / "out"), whole)
    return outcome


def _outcome(answer: dict[str, Any]) -> str:
    """Return how a command that met the error ended.

    Raises:
        Fault: in another way than with status 2 and one line.
    """
    lines = [line for line in answer["printed"].replace("\r", "\n").splitlines() if line.startswith("error: ")]
    if "Traceback" in answer["printed"] or "Exception ignored" in answer["printed"]:
        raise Fault(f"a traceback: {answer['printed'][-300:]}")
    if answer["outcome"] == "returned":
        return "went on"
    if answer["message"] != "status 2" or len(lines) != 1:
        raise Fault(f"{answer['outcome']}: {answer['message']}; {len(lines)} lines of error")
    return "one line"


def _no_halves(found: dict[str, str], whole: dict[str, str]) -> None:
    """Raise :class:`Fault` for a file under its final name that is not what it is to be."""
    for name, digest in found.items():
        hidden = any(part.startswith(".") or part.endswith((".parts", "parts")) for part in Path(name).parts)
        if not hidden and name in whole and digest != whole[name] and not name.endswith("latest"):
            raise Fault(f"{name} is there and is not whole")
