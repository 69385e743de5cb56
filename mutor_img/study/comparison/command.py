"""``python -m mutor_img.study`` for a YAML that has rows: train and score what is missing, then show what there is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mutor_img.common.cli import Parser
from mutor_img.common.config import config_files
from mutor_img.common.errors import UserError, check_choice, check_range, naming
from mutor_img.common.files import write_atomic
from mutor_img.common.locks import claim, folder_lock
from mutor_img.metrics.networks import load_features
from mutor_img.metrics.references import check_role, open_reference
from mutor_img.metrics.requirements import resolve
from mutor_img.pretraining.plan import run_flops, run_summary
from mutor_img.study.comparison.commands import LAUNCHERS, printed, stages
from mutor_img.study.comparison.config import ComparisonConfig
from mutor_img.study.comparison.jobs import Job, all_jobs
from mutor_img.study.comparison.ledger import scored, targets, wanted
from mutor_img.study.comparison.plots import draw_all
from mutor_img.study.comparison.pool import Budget, Outcome, run_jobs
from mutor_img.study.comparison.report import markdown
from mutor_img.training.command import read_training

MARKS = {"rows", "base", "seeds", "guidance", "checkpoints"}  # keys that tell a comparison from the demo's study
FLAGS = ("jobs", "print_commands")


def is_comparison(config: str) -> bool:
    """Tell whether a config, or what it extends, is that of a comparison."""
    return any(MARKS & layer.keys() for _, layer in config_files(config))


def add_flags(parser: Parser) -> None:
    """Add the flags that only a comparison has."""
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="how many runs of a study with rows to do at a time; they share the processor's "
                             "threads")
    parser.add_argument("--print-commands", nargs="?", const=LAUNCHERS[0], metavar="LAUNCHER",
                        help="print a line for each run that is not done in place of running it: "
                             f"{' or '.join(LAUNCHERS)} (without a word: {LAUNCHERS[0]})")


def spelt_out(argv: Sequence[str]) -> list[str]:
    """Return the command line with a launcher behind ``--print-commands`` where an override follows it.

    argparse would take the override for the launcher.
    """
    alone = [word == "--print-commands" and "=" in follower for word, follower in zip(argv, [*argv[1:], ""])]
    return [f"{word}={LAUNCHERS[0]}" if bare else word for word, bare in zip(argv, alone)]


def plan(study: ComparisonConfig) -> dict[str, Any]:
    """Return what ``--dry-run`` prints: how much there is to do, and what each row costs."""
    jobs = all_jobs(study)
    rows = {name: run_summary(config) for name, config in {job.row: job.config for job in jobs}.items()}
    base = rows[study.baseline_name]["FLOPs per update"]
    return {"runs": len(jobs), "scores": len(wanted(study, jobs)), **{
        f"row {name}": {**row, f"times the FLOPs per update of {study.baseline_name}": row["FLOPs per update"] / base}
        for name, row in rows.items()}}


def compare(arguments: argparse.Namespace) -> None:
    """Do what the command line says; what is done already is left alone.

    Raises:
        UserError: a mistake in the study's YAML, or runs that failed, once all others are done.
    """
    check_range("--jobs", arguments.jobs, 1, 10_000)
    if arguments.print_commands is not None:
        check_choice("--print-commands", arguments.print_commands, LAUNCHERS)
    study = read_training(arguments, ComparisonConfig, plan)
    if study is None:
        return
    jobs, words = all_jobs(study), ["--config", arguments.config, *arguments.overrides]
    if arguments.print_commands is not None:
        print("\n".join(printed(unfinished(study, jobs), words, arguments.print_commands)))
        return
    with claim(folder_lock(study.run_dir)):
        outcome = _run(study, jobs, words, arguments.jobs)
        _show(study, jobs)
    if outcome.spent:
        print(f"the budget of {study.budget_hours:g} hours is spent; to go on, raise budget_hours and run the same "
              "command again")
    if outcome.failed:
        raise UserError(f"{len(outcome.failed)} of {len(jobs)} runs failed; to try again, fix what is said here and "
                        "run the same command: " + "; ".join(f"{job}: {why}" for job, why in outcome.failed.items()))


def unfinished(study: ComparisonConfig, jobs: Sequence[Job]) -> list[Job]:
    """Return the runs of which a score is missing, in order."""
    done = scored(study, jobs)
    return [job for job in jobs if any(place not in done for place in wanted(study, [job]))]


def _run(study: ComparisonConfig, jobs: Sequence[Job], words: Sequence[str], workers: int) -> Outcome:
    """Train and score what is missing."""
    folder, left = Path(study.run_dir), unfinished(study, jobs)
    if left:
        _check_judges(study)
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} runs are done already", flush=True)
    budget = Budget(folder / "spent.json", study.budget_hours)
    flops = _flops(left)
    return run_jobs(left, lambda job: stages(job, words), workers, folder / "logs", budget,
                    lambda job: _write_table(study, jobs), lambda job: flops[job.row])


def _check_judges(study: ComparisonConfig) -> None:
    """Raise :class:`UserError` where what scores a run is not there or not for it: better now than after training."""
    with naming("reference"):
        reference = open_reference(study.reference)
        check_role(reference, "generation", force=False)
    network = load_features(study.features, study.features_weights, torch.device("cpu"))
    resolve(study.metrics or None, reference, network)


def _flops(jobs: Sequence[Job]) -> dict[str, float]:
    """Return the FLOPs of one run of each row."""
    configs = {job.row: job.config for job in jobs}
    return {row: run_flops(config, config.train.steps) for row, config in configs.items()}


def _write_table(study: ComparisonConfig, jobs: Sequence[Job]) -> str:
    """Write and return the Markdown of what is scored by now."""
    done = scored(study, jobs)
    page = markdown(study, done, len(wanted(study, jobs)) - len(done))
    write_atomic(Path(study.run_dir) / "table.md", lambda aside: aside.write_text(page))
    return page


def _show(study: ComparisonConfig, jobs: Sequence[Job]) -> None:
    """Write tables and pictures, and print the tables and where everything is."""
    print(f"\n{_write_table(study, jobs)}")
    pictures = draw_all(study, jobs, scored(study, jobs), targets(study, jobs))
    print("\n".join(["pictures:", *(f"  {path}" for path in pictures)] if pictures else []))
    print(f"table: {study.run_dir}/table.md\nrows: {study.run_dir}/rows.jsonl")
