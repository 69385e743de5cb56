"""One of two processes under torchrun raises, hangs, is stopped, killed or out of memory, or the launcher dies.

All others have to end within ``train.timeout_minutes`` and the time that torchrun leaves them, what they print last has
to say why, and the same command, run again, leaves the bytes of a run that nothing disturbed.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch

from benchmarks.chaos import kills
from benchmarks.chaos.case import Case, Fault, Place
from benchmarks.chaos.steps import Step
from mutor_img.common.errors import UserError
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training.trainer import Trainer

TIMEOUT, SLACK = 4.0, 20.0  # seconds: of the run, of a busy machine
COMMAND = "launcher of two"
_PROGRESS = re.compile(r"(run: .*\]|step \d.*)")


def _mistake() -> None:
    raise UserError("this process has made a mistake")


def _defect() -> None:
    raise ZeroDivisionError("this process has a defect")


def _take_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**35, resource.RLIM_INFINITY))
    torch.zeros(2**36)


# what happens to a process: how, and what the last line says
FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "makes a mistake": (_mistake, "error: this process has made a mistake"),
    "raises": (_defect, "ZeroDivisionError: this process has a defect"),
    "needs too much memory": (_take_memory, "memory"),
    "hangs": (lambda: time.sleep(1000), "train.timeout_minutes"),
    "is stopped": (lambda: os.kill(os.getpid(), signal.SIGSTOP), "train.timeout_minutes"),
    "is killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "has gone"),
}
# when: a method that all processes call, and which of its calls
MOMENTS: dict[str, tuple[type, str, int]] = {
    "in an update": (GeneratorTask, "loss", 9), "in a validation": (GeneratorTask, "validate", 1),
    "at a save": (Trainer, "save", 2),
}


def work(what: str, when: str, rank: int, folder: str) -> None:
    """Be torchrun, and have something happen to one of its two processes. Runs in a fork."""
    (owner, name, call), act = MOMENTS[when], FAULTS[what][0]

    def begin() -> None:
        if os.environ["RANK"] == str(rank):
            good, calls = getattr(owner, name), []

            def spoilt(*arguments: Any) -> Any:
                calls.append(1)
                if len(calls) == call:
                    act()
                return good(*arguments)

            setattr(owner, name, spoilt)

    Step.begin = staticmethod(begin)
    kills.type_in(COMMAND, folder, f"train.timeout_minutes={TIMEOUT / 60}")


def go_on(folder: str) -> None:
    """Be torchrun of a run that would last for hours. Runs in a fork."""
    kills.type_in(COMMAND, folder, "train.steps=1000000", "train.checkpoint_every=0")


def cases(place: Place) -> list[Case]:
    """Return a case for each thing that happens, each moment and each process; and the launcher that dies."""
    kills.prepare(place.folder)
    found, whole = [], {}
    for what, when, rank in product(FAULTS, MOMENTS, range(2)):
        found.append(Case(f"process {rank} {what} {when}",
                          lambda a=(what, when, rank): _try(*a, whole, place)))
    return [*found, Case("the launcher is killed", lambda: _lose_launcher(place))]


def _try(what: str, when: str, rank: int, whole: dict[str, Any], place: Place) -> str:
    out, log = place.folder / "out", place.folder / "steps.log"
    if not whole:
        kills.finish(COMMAND, place)
        whole.update(kills.results(out))
    shutil.rmtree(out, ignore_errors=True)
    log.unlink(missing_ok=True)
    begun = time.monotonic()
    answer = place.forks.run(f"{__name__}:work", what, when, rank, str(place.folder))
    seconds = time.monotonic() - begun
    # Process 0 may be a step behind: its progress is no reason.
    lines = [line for line in log.read_text().splitlines() if line.strip() and not _PROGRESS.fullmatch(line.strip())]
    if answer["outcome"] == "returned":
        raise Fault("torchrun ended as if all was well")
    if seconds > TIMEOUT + kills.SHUTDOWN + SLACK:
        raise Fault(f"the others ended after {seconds:.0f} s")
    if FAULTS[what][1] not in lines[-1]:
        raise Fault(f"the last line is {lines[-1][:300]!r}")
    kills.finish(COMMAND, place)
    if kills.results(out) != whole:
        raise Fault("run again, it leaves other files")
    return f"{what}: all end"


def _lose_launcher(place: Place) -> str:
    """Kill torchrun; its processes save and end."""
    shutil.rmtree(place.folder / "out", ignore_errors=True)
    metrics = place.folder / "out" / "run" / "metrics.jsonl"
    answer = place.forks.run(f"{__name__}:go_on", str(place.folder), kill=(12.0, signal.SIGKILL))
    if answer["outcome"] != "killed" or not metrics.is_file():
        raise Fault(f"{answer['outcome']}: {answer['message']}")
    log = (place.folder / "steps.log").read_text()
    if "to resume, run the same command again" not in log:
        raise Fault(f"the processes did not save: {log[-300:]}")
    return "launcher: all save and end"
