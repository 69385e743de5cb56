"""A Python process of its own for what may crash, hang or be killed: the caller gets an answer, or the reason why not.

A question is a line of JSON on the child's standard input, an answer a line of JSON in a pipe of its own. Whatever else
the child prints goes into a log. It has its own process group, which is killed as a whole, with all that it started.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# What launchers set for each process: with it the child would take itself for one of the launch.
_LAUNCH = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|"
                     r"(TORCHELASTIC|ACCELERATE|OMPI_COMM_WORLD|MV2_COMM_WORLD|PMI)_.*")
_LOG = 4000  # bytes of the log that a failure shows
_DYING = 10.0  # seconds: a process that hangs in a driver may take a while to die, or never do
_PR_SET_PDEATHSIG = 1  # Linux
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # found here: between fork and exec nothing may be loaded


class ChildFailed(Exception):
    """No answer came: the message says why, in one line.

    Attributes:
        log: the end of what the child printed.
    """

    def __init__(self, reason: str, log: str = ""):
        super().__init__(reason)
        self.log = log


def module_command(name: str) -> list[str]:
    """Return the command that runs a module of this project as a child, whatever lies in the current folder."""
    return [sys.executable, "-P", "-m", name]


def door_command(name: str) -> list[str]:
    """Return the command that runs ``train``, ``sample`` or ``evaluate_fid``, also where they are no scripts."""
    return [sys.executable, "-P", "-c", f"from mutor_img.common.doors import {name}; {name}()"]


class Child:
    """A child process; leaving the context kills it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        """Start ``command`` with the number of the answers' pipe as its last argument.

        Args:
            command: starts the process.
            environment: variables that it has unless they are set already.

        Raises:
            ChildFailed: no process can be started.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open until the child ends)
        self._answers, theirs = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs)], stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT,
                pass_fds=(theirs,), env=child_environment(environment), start_new_session=True)
        except OSError as error:
            os.close(self._answers)
            self._log.close()
            raise ChildFailed(f"cannot be started ({error})") from None
        finally:
            os.close(theirs)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ask(self, question: Any, seconds: float) -> Any:
        """Return the child's answer to ``question``; both are what JSON can say.

        Args:
            question: what :func:`serve` hands to the child's function.
            seconds: how long the answer may take.

        Raises:
            ChildFailed: the child ended, was silent for longer, or answered what is not JSON. It is killed.
        """
        with suppress(BrokenPipeError):  # it is gone already: how it ended is read below
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        line, deadline = bytearray(), time.monotonic() + seconds
        while not line.endswith(b"\n"):
            left, ended = deadline - time.monotonic(), self._ended()
            if left <= 0 and not ended:
                raise self._failure(f"gave no answer within {seconds:g} s and was killed")
            ready, _, _ = select.select([self._answers], [], [], 0 if ended else min(left, 0.2))
            part = os.read(self._answers, 2**16) if ready else b""
            line += part
            if not part and (ready or ended):
                raise self._failure(self._how_it_ended())
        try:
            return json.loads(line)
        except ValueError:
            raise self._failure(f"answered {bytes(line[:60])!r}, which is not JSON") from None

    def kill(self) -> None:
        """Kill the child and all that it started; :meth:`ask` raises."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill the child and all that it started."""
        if self._log.closed:
            return
        self.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_DYING)
        os.close(self._answers)
        self._log.close()
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def _ended(self) -> bool:
        """Return whether the child has ended. It stays a zombie, so that its number still names its group."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _how_it_ended(self) -> str:
        deadline = time.monotonic() + _DYING
        while not self._ended() and time.monotonic() < deadline:  # the pipe closes a moment before the process ends
            time.sleep(0.01)
        found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return "closed its pipe without an answer and was killed"
        if found.si_code == os.CLD_EXITED:
            return f"ended with status {found.si_status} and no answer"
        return f"ended by {signal.Signals(found.si_status).name} ({signal.strsignal(found.si_status)})"

    def _failure(self, reason: str) -> ChildFailed:
        """Kill the child; returns what to raise, with the log's most telling line."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _LOG))
        log = self._log.read().decode(errors="replace").strip()
        self.close()
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        telling = [line for line in lines if re.match(r"Fatal Python error|[\w.]*(Error|Exception)\b", line)]
        last = (telling or lines)[-1:]
        return ChildFailed("; ".join([reason, *(f"it printed: {line[:200]}" for line in last)]), log)


def serve(answer: Callable[[Any], Any]) -> None:
    """Be the child: answer questions until the parent has no more. What ``answer`` raises ends this process."""
    die_with_parent()
    pipe = int(sys.argv[-1])
    os.set_inheritable(pipe, False)
    with open(pipe, "wb") as answers:
        for line in sys.stdin:
            answers.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
            answers.flush()


def child_environment(defaults: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without the launch, and with this project where the child finds it first.

    Args:
        defaults: variables that are there unless they are set already.
    """
    kept = {name: value for name, value in os.environ.items() if not _LAUNCH.fullmatch(name)}
    root = str(Path(__file__).resolve().parents[2])
    return {**(defaults or {}), **kept, "PYTHONPATH": os.pathsep.join([root, *filter(None, [kept.get("PYTHONPATH")])]),
            "PYTHONFAULTHANDLER": "1"}  # a crash in native code prints where Python was


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the system send this process a signal when its parent is gone (Linux; elsewhere it goes on).

    A child calls it, or ``subprocess`` in the child's place: ``preexec_fn=die_with_parent``.
    """
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, number)


def die_with_torchrun(number: int = signal.SIGKILL) -> None:
    """Have the system send this process a signal when torchrun is gone, if torchrun started it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(number)
