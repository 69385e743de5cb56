"""A process that has loaded the project once, and does each trial in a fork of itself, under a limit of memory.

A fork takes milliseconds where a new Python takes seconds, and whatever the trial does to itself goes with it.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from mutor_img.common.child import Child, module_command, serve
from mutor_img.common.errors import UserError

PATIENCE = 120.0  # seconds that one trial may take
# What a file that is only read has no business to cause.
_ACTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "os.mkdir", "os.remove", "os.rename",
         "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.putenv", "shutil.", "socket.connect", "socket.bind",
         "ctypes.dlopen", "webbrowser.open")


class Forks:
    """The client's side; ``close`` ends the process.

    Attributes:
        disks_fail: calls that write can be made to fail: gcc is there to compile ``failing_disk.c``.
    """

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory()
        self.disks_fail = shutil.which("gcc") is not None
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if self.disks_fail:
            library = environment["LD_PRELOAD"] = f"{self._folder.name}/failing_disk.so"
            source = Path(__file__).with_name("failing_disk.c")
            subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        self._child = Child(module_command(__name__), environment)

    def run(self, function: str, *arguments: Any, memory: int | None = None,
            kill: tuple[float, int] = (PATIENCE, signal.SIGKILL)) -> dict[str, Any]:
        """Call ``module:function`` with arguments that JSON can say, in a fork.

        Args:
            function: where it is.
            arguments: for it.
            memory: bytes of address space that it may take beyond what the process has.
            kill: the seconds after which it gets a signal, and which.

        Returns:
            ``outcome``: "returned", "refused" (a UserError), "raised", "ended" or "killed"; ``message``: of the error,
            or what was returned, as JSON; ``acts``: what it did that reading does not need; ``memory``: bytes of
            address space that it took at most; ``printed``: on the standard error stream; ``signalled``: it ran for
            long enough to get the signal.
        """
        question = {"function": function, "arguments": arguments, "memory": memory}
        return self._child.ask({"kill": kill, "question": question}, 2 * PATIENCE + 60)

    def close(self) -> None:
        """End the process."""
        self._child.close()
        self._folder.cleanup()


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Do one trial in a fork, and wait for it and for all that it started."""
    (seconds, number), question, sent = asked["kill"], asked["question"], []
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        with open(send, "wb") as pipe:
            pipe.write(json.dumps(_trial(**question)).encode())
        os._exit(0)
    os.close(send)

    def end(*_: object) -> None:
        os.kill(child, signal.SIGKILL if sent else number)
        sent.append(number)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, PATIENCE)
    with open(receive, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    code = os.waitstatus_to_exitcode(status)
    answer = json.loads(told) if told else {"outcome": "killed", "message": f"status {code} and no answer", "acts": [],
                                            "memory": 0, "printed": ""}
    return {**answer, "signalled": bool(sent)}


def _trial(function: str, arguments: list[Any], memory: int | None) -> dict[str, Any]:
    module, _, name = function.partition(":")
    work, acts, printed = getattr(importlib.import_module(module), name), [], io.StringIO()
    begun = _bytes_of("VmSize")
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (begun + memory, resource.RLIM_INFINITY))
    sys.addaudithook(lambda event, details: acts.append(event) if event.startswith(_ACTS) else None)
    try:
        with redirect_stderr(printed), redirect_stdout(io.StringIO()):
            outcome, message = "returned", json.dumps(work(*arguments), default=str)
    except UserError as error:
        outcome, message = "refused", str(error)
    except SystemExit as error:
        outcome, message = "ended", f"status {error.code}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = "raised"
        message = f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
    if memory is not None:
        with suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"outcome": outcome, "message": message, "acts": acts, "memory": max(0, _bytes_of("VmPeak") - begun),
            "printed": printed.getvalue()}


def _bytes_of(name: str) -> int:
    """Return a number of this process's address space: ``VmSize``, or ``VmPeak``, its peak so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def _load() -> None:
    """Import what trials need, so that none of it counts as theirs."""
    for name in ("benchmarks.chaos.hostile", "benchmarks.chaos.processes", "mutor_img.pretraining.command",
                 "tokenizer.train", "tokenizer.encode", "tokenizer.reconstruct", "mutor_img.sampling.command",
                 "mutor_img.evaluation.command", "mutor_img.study.__main__", "PIL.Image", "pyarrow.parquet",
                 "timm.utils", "matplotlib.figure", "torch._dynamo", "torch.distributed.run"):
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)
    from PIL import Image

    Image.init()


if __name__ == "__main__":
    _load()
    serve(_answer)
