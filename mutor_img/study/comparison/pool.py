"""Runs side by side, each in processes of its own, until all are done or the budget is spent."""

from __future__ import annotations

import re
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from mutor_img.common.child import child_environment, die_with_parent
from mutor_img.common.files import read_record, write_sealed
from mutor_img.common.threads import share
from mutor_img.study.comparison.jobs import Job

POLL = 0.2  # seconds between looks at the processes
BEAT = 20.0  # seconds between notes of the time spent: a kill loses no more
Stages = list[tuple[str, list[str]]]


class Budget:
    """The hours that a study has run, over all sittings, kept in a file.

    Attributes:
        hours: how many it may run; None: no limit.
    """

    def __init__(self, path: Path, hours: float | None, now: Callable[[], float] = time.monotonic):
        self.path, self.hours, self._now = path, hours, now
        self._before = float(read_record(path, "seconds")["seconds"]) if path.is_file() else 0.0
        self._begun = self._noted = now()

    @property
    def seconds(self) -> float:
        """How long the study has run, with this sitting."""
        return self._before + self._now() - self._begun

    @property
    def over(self) -> bool:
        """Whether nothing more may run."""
        return self.hours is not None and self.seconds >= 3600 * self.hours

    def note(self, force: bool = False) -> None:
        """Write the time down, at most every ``BEAT`` seconds."""
        if force or self._now() - self._noted >= BEAT:
            self._noted = self._now()
            write_sealed(self.path, {"seconds": round(self.seconds, 1)})


@dataclass
class Work:
    """A run under way.

    Attributes:
        job: which.
        left: the stages to come.
        log: where everything goes that they print.
        stage, process: what is running.
        former: bytes of the log that earlier stages and sittings have written.
        begun: when, on :func:`time.monotonic`'s clock.
    """

    job: Job
    left: deque[tuple[str, list[str]]]
    log: Path
    begun: float = field(default_factory=time.monotonic)
    stage: str = ""
    process: subprocess.Popen | None = field(default=None, repr=False)
    former: int = 0

    def start(self, threads: Mapping[str, str]) -> None:
        """Start the next stage.

        Args:
            threads: what :func:`share` returns.
        """
        self.stage, command = self.left.popleft()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.former = self.log.stat().st_size if self.log.is_file() else 0
        with open(self.log, "ab") as output:  # what went on unseen after a kill would own what the next one writes
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                            env=child_environment(threads), preexec_fn=die_with_parent)


@dataclass
class Pace:
    """How long runs have taken in this sitting, and so what is left of it.

    Attributes:
        cost: returns what a run costs, in any unit.
        workers: runs at a time.
        now: a clock, that of :class:`Work`.
        seconds, spent: the seconds of all runs that are done, and their costs.
    """

    cost: Callable[[Job], float]
    workers: int
    now: Callable[[], float] = time.monotonic
    seconds: float = 0.0
    spent: float = 0.0

    def note(self, work: Work) -> None:
        """Take a run that is done."""
        self.seconds += self.now() - work.begun
        self.spent += self.cost(work.job)

    def eta(self, waiting: Iterable[Job], running: Iterable[Work]) -> str:
        """Return when the others are done if each takes as long for its cost, as ``tqdm`` writes it."""
        now, rate = self.now(), self.seconds / self.spent
        lasting = [rate * self.cost(job) for job in waiting]
        lasting += [max(rate * self.cost(work.job) - (now - work.begun), 0.0) for work in running]
        return tqdm.format_interval(max([sum(lasting) / self.workers, *lasting]))


@dataclass
class Outcome:
    """How a sitting ended.

    Attributes:
        failed: what went wrong, by the run's title.
        spent: the budget ended it.
    """

    failed: dict[str, str] = field(default_factory=dict)
    spent: bool = False


def run_jobs(jobs: Sequence[Job], stages_of: Callable[[Job], Stages], workers: int, logs: Path, budget: Budget,
             done: Callable[[Job], None] = lambda job: None, cost: Callable[[Job], float] = lambda job: 1.0) -> Outcome:
    """Run jobs in order, ``workers`` at a time, with the processor's threads divided among them.

    A job that fails is noted, and the others go on. When the budget is spent, and when this process is told to end,
    every run is told to: training saves, and what is scored is kept.

    Args:
        jobs: what is to be done.
        stages_of: returns the commands of a job, one after the other.
        workers: how many at a time.
        logs: a folder; each job has a file in it.
        budget: the hours.
        done: called after each job that is done.
        cost: of a job, in any unit, for the ETA.
    """
    waiting, running, outcome, pace = deque(jobs), [], Outcome(), Pace(cost, workers)
    threads = share(workers)
    count, begun = len(waiting), 0
    try:
        while waiting or running:
            if budget.over:
                outcome.spent = True
                break
            while waiting and len(running) < workers:
                job = waiting.popleft()
                begun += 1
                work = Work(job, deque(stages_of(job)), logs / f"{job.run_dir.name}.log")
                running.append(work)
                _next(work, threads, f"[{begun} of {count}] ")
            for work in list(running):
                if not _ended(work, outcome):
                    continue
                if work.left and work.job.title not in outcome.failed:
                    _next(work, threads)
                    continue
                running.remove(work)
                if work.job.title not in outcome.failed:
                    done(work.job)
                    pace.note(work)
                    print(f"{work.job.title}: done; ETA of all runs {pace.eta(waiting, running)}", flush=True)
            budget.note()
            time.sleep(POLL)
    finally:
        _end([work.process for work in running if work.process is not None])
        budget.note(force=True)
    return outcome


def _next(work: Work, threads: Mapping[str, str], begin: str = "") -> None:
    work.start(threads)
    print(f"{begin}{work.job.title}: {work.stage} (log: {work.log})", flush=True)


def _ended(work: Work, outcome: Outcome) -> bool:
    """Tell whether a stage is over, and note what went wrong."""
    status = work.process.poll()
    if status is None:
        return False
    reason = None
    if status:
        reason = last_error(work.log, work.former) or f"{work.stage} ended with status {status}"
    elif work.stage == "training" and not work.job.trained:
        reason = "training was stopped before its end; run the same command again to go on"
    if reason:
        outcome.failed[work.job.title] = f"{reason} (log: {work.log})"
        print(f"{work.job.title}: {work.stage} failed: {reason}", flush=True)
    return True


def last_error(log: Path, former: int = 0) -> str | None:
    """Return the last line that says what was wrong, of what a log holds behind ``former`` bytes; None: none does."""
    found = re.findall(r"^(?:error: (.*)|([\w.]*(?:Error|Exception)\b.*))$",
                       log.read_bytes()[former:].decode(errors="replace").replace("\r", "\n"), re.MULTILINE)
    return next((one or other for one, other in reversed(found)), None)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Have processes end: training saves when it is told so."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        process.wait()
