"""The report: what machine, what was checked, what came out, in Markdown.

Checks run in a process of their own, so that one that crashes or hangs costs its own line and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any

from tqdm import tqdm

from mutor_img.common.child import Child, ChildFailed, module_command
from mutor_img.gpu_report.worker import ENVIRONMENT

WORKER = module_command("mutor_img.gpu_report.worker")
# The longest compile some dozen kernels and train for some updates, a matter of a few minutes on a busy machine.
SECONDS = 900.0


@dataclass(frozen=True)
class Outcome:
    """One check's result: its detail where it passed, what was wrong where it failed."""

    name: str
    passed: bool
    detail: str
    seconds: float


class Worker:
    """Asks a process, and after a failure another one: a device that has failed once fails at everything."""

    def __init__(self, question: dict[str, Any], command: Sequence[str] = WORKER, seconds: float = SECONDS,
                 environment: Mapping[str, str] | None = None):
        """Prepare.

        Args:
            question: what every question holds beside its ``check``.
            command: starts the process.
            seconds: that an answer may take.
            environment: variables of the process, as :class:`Child` takes them.
        """
        self.question, self.command, self.seconds, self.variables = question, command, seconds, environment
        self.child: Child | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        if self.child:
            self.child.close()
            self.child = None

    def kill(self) -> None:
        """Kill the process; whoever waits for its answer learns of it."""
        if child := self.child:
            child.kill()

    def ask(self, name: str) -> dict[str, Any]:
        """Return the answer to ``name``; raises :class:`ChildFailed` where there is none."""
        try:
            self.child = self.child or Child(self.command, self.variables)
            return self.child.ask({**self.question, "check": name}, self.seconds)
        except ChildFailed:
            self.__exit__()
            raise

    def check(self, name: str) -> Outcome:
        """Run one check; whatever becomes of it is its outcome."""
        begun = time.perf_counter()
        try:
            found = self.ask(name)
            passed, detail = found["passed"], found["detail"]
        except ChildFailed as failure:
            passed, detail = False, f"the check's process {failure}\n\n{failure.log}".strip()
        if not passed:
            self.__exit__()
        return Outcome(name, passed, detail, time.perf_counter() - begun)

    def environment(self) -> dict[str, str]:
        """Return what there is to say of the machine, or why that is not known."""
        try:
            return self.ask(ENVIRONMENT)
        except ChildFailed as failure:
            return {"machine": f"unknown: the process that looks {failure}"}


def run_checks(names: Sequence[str], workers: Sequence[Worker], note: Callable[[list[Outcome]], None]) -> list[Outcome]:
    """Run checks, as many at a time as there are workers, and end the workers' processes.

    Args:
        names: of the checks.
        workers: one for each check at a time.
        note: is called after each check with all outcomes so far, in the order of ``names``.
    """
    outcomes: dict[int, Outcome] = {}
    left = iter(range(len(names)))  # of all threads: each number is taken once
    noting, ended = Lock(), Event()

    def work(worker: Worker) -> None:
        """Run checks until none is left, in one thread: the system ends a process with the thread that started it."""
        with worker:
            for number in left:
                outcome = worker.check(names[number])
                with noting:
                    if ended.is_set():  # the process was killed: that is no outcome
                        return
                    outcomes[number] = outcome
                    bar.set_description(outcome.name, refresh=False)
                    bar.update()
                    if not outcome.passed:
                        reason = (outcome.detail.splitlines() or ["no reason given"])[0]
                        bar.write(f"FAILED {outcome.name}: {reason}")
                    note([outcomes[number] for number in sorted(outcomes)])

    with ThreadPoolExecutor(len(workers)) as pool, tqdm(total=len(names), unit="check", dynamic_ncols=True) as bar:
        try:
            for done in as_completed([pool.submit(work, worker) for worker in workers]):
                done.result()
        except BaseException:
            ended.set()
            for worker in workers:
                worker.kill()
            raise
    return [outcomes[number] for number in range(len(names))]


def to_markdown(facts: dict[str, str], outcomes: Sequence[Outcome], planned: int) -> str:
    """Return the report: verdict, machine, failures in full, a line per check; ``planned`` checks make it whole."""
    failed = [outcome for outcome in outcomes if not outcome.passed]
    verdict = f"{len(failed)} of {planned} checks FAILED" if failed else f"all {planned} checks passed"
    if len(outcomes) < planned:
        verdict = f"unfinished, {len(outcomes)} of {planned} checks done, {len(failed)} FAILED"
    lines = [f"## GPU report: {verdict}", "", *(f"- {name}: {value}" for name, value in facts.items())]
    for outcome in failed:
        lines += ["", f"### FAILED: {outcome.name}", "```", outcome.detail[:4000], "```"]
    lines += ["", "| check | result | seconds | detail |", "|---|---|---|---|"]
    for outcome in outcomes:
        detail = (outcome.detail.splitlines() or [""])[0].replace("|", "\\|")
        lines.append(f"| {outcome.name} | {'pass' if outcome.passed else 'FAIL'} | {outcome.seconds:.1f} | {detail} |")
    return "\n".join(lines) + "\n"
