"""A stand-in for ``subprocess.Popen`` that starts one of the project's commands as a fork, which costs no import.

Studies and torchrun start their commands so: what is tried is their own code, with everything but the new Python.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from mutor_img.common import cli

_MAINS = {"train.py": "mutor_img.pretraining.command", "sample.py": "mutor_img.sampling.command",
          "evaluate_fid.py": "mutor_img.evaluation.command", "mutor_img.study": "mutor_img.study.__main__"}


class Step:
    """A process like that of ``subprocess.Popen``.

    Attributes:
        log: where everything goes that a step prints, unless it is started with a file for it.
        begin: called first in each step; set by whoever wants to do something to it.
    """

    log = Path(os.devnull)
    begin: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, args: Sequence[str], env: Mapping[str, str] | None = None,
                 preexec_fn: Callable[[], None] | None = None, start_new_session: bool = False,
                 stdout: IO[Any] | None = None, **_: object):
        self.returncode: int | None = None
        ready, begun = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(begun)
            os.read(ready, 1)  # until it is closed: as Popen, this returns once the process has its session
            os.close(ready)
            return
        status = 1
        try:
            os.close(ready)
            for number, handler in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
                signal.signal(number, handler)
            _close_sockets()
            if start_new_session:
                os.setsid()
            if preexec_fn is not None:
                preexec_fn()
            os.close(begun)
            sys.stdout = sys.stderr = open(stdout.fileno() if stdout else self.log, "a", buffering=1)  # noqa: SIM115
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
            type(self).begin()
            status = _status([str(word) for word in args])
        finally:
            os._exit(status)

    def __enter__(self) -> Step:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def poll(self) -> int | None:
        """Return its status if it has ended, below 0 the number of a signal."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns its status."""
        deadline = time.monotonic() + timeout if timeout is not None else None
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("step", timeout)
            time.sleep(0.005)
        return self.returncode

    def terminate(self) -> None:
        """Tell it to end."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


def be(words: Sequence[str]) -> None:
    """Be the command that a Python's arguments say, as in ``-m tokenizer.encode``, ``-u train.py`` or ``-c CODE``."""
    if "-c" in words:
        at = words.index("-c") + 1
        sys.argv = ["-c", *words[at + 1:]]
        exec(words[at], {})
        return
    at = next(number for number, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    at += words[at] == "-m"
    cli.run(importlib.import_module(_MAINS.get(words[at], words[at])).main, words[at + 1:])


def _close_sockets() -> None:
    """Close sockets, as a new program would: torchrun's, in a worker, would keep alive what ends with torchrun."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                os.close(int(number))


def _status(words: Sequence[str]) -> int:
    """Return the status with which a command ended."""
    try:
        be(words)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0
