"""What is scored already: one line of JSON for each run, checkpoint and guidance scale.

Lines are only ever added. One counts for a study as it stands now if it was scored by the same settings, of the same
run, and of the weights that the run's checkpoint holds, unless that is gone or damaged; of several the last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mutor_img.checkpoints.folder import checkpoint_at, peek_meta
from mutor_img.checkpoints.tensor_files import group_hash, sampled_group
from mutor_img.common.errors import UserError
from mutor_img.common.files import append_line, read_lines, sealed
from mutor_img.study.comparison.config import ComparisonConfig
from mutor_img.study.comparison.jobs import Job

ROWS, TARGETS = "rows.jsonl", "targets.jsonl"
_KEYS = ("row", "seed", "updates", "config_hash", "weights_hash")  # of every line

Place = tuple[str, int, int, float]  # row, seed, updates, guidance scale


def scoring_key(study: ComparisonConfig) -> str:
    """Return the sha256 of the settings that decide a score of given weights, the guidance scale apart."""
    settings = {name: getattr(study, name) for name in ("temperature", "samples", "reference", "metrics", "features",
                                                        "features_weights")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def wanted(study: ComparisonConfig, jobs: Iterable[Job]) -> list[Place]:
    """Return every place of the table."""
    return [(job.row, job.seed, step, scale) for job in jobs for step in job.steps for scale in study.guidance]


def scored(study: ComparisonConfig, jobs: Iterable[Job]) -> dict[Place, dict[str, Any]]:
    """Return the lines of scores that count, by place."""
    scoring = scoring_key(study)
    return {(job.row, job.seed, line["updates"], line["cfg_scale"]): line for job, line in _current(study, ROWS, jobs)
            if line["scoring_hash"] == scoring and line["cfg_scale"] in study.guidance}


def targets(study: ComparisonConfig, jobs: Iterable[Job]) -> dict[tuple[str, int, int], list[list[float]]]:
    """Return [down, right, loss] for each target of registers, by row, seed and updates."""
    return {(job.row, job.seed, line["updates"]): line["losses"] for job, line in _current(study, TARGETS, jobs)
            if line.get("held_out", study.held_out) == study.held_out}


def _current(study: ComparisonConfig, name: str, jobs: Iterable[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Yield the lines of runs as they are now, with their run."""
    runs, known = {(job.row, job.seed): job for job in jobs}, {}
    for line in read_lines(Path(study.run_dir) / name, *_KEYS):
        job, step = runs.get((line["row"], line["seed"])), line["updates"]
        if job is None or line["config_hash"] != job.key or step not in job.steps:
            continue
        if (job.run_dir, step) not in known:  # not the key, which rows of the same settings share
            known[job.run_dir, step] = weights_at(job, step)
        if known[job.run_dir, step] in (None, line["weights_hash"]):
            yield job, line


def weights_at(job: Job, step: int) -> str | None:
    """Return the hash of the weights that sampling takes from a checkpoint; None: it is not there, or damaged."""
    folder = checkpoint_at(job.run_dir, step)
    with suppress(UserError):
        if (folder / "checkpoint.json").is_file():
            files = peek_meta(folder)["files"]
            return group_hash(files, sampled_group(files))
    return None


def check_same_judge(study: ComparisonConfig, judge: dict[str, Any]) -> None:
    """Refuse to add scores to those of another reference or feature network of the same path.

    Raises:
        UserError: a line of the same settings was scored against something else.
    """
    scoring, path = scoring_key(study), Path(study.run_dir) / ROWS
    for line in read_lines(path, *_KEYS, "scoring_hash", "judged_by"):
        for name in ("reference_hash", "features_hash"):
            if line["scoring_hash"] == scoring and line["judged_by"][name] != judge[name]:
                raise UserError(f"{path}: {line['row']}, seed {line['seed']}, was scored with {name} "
                                f"{line['judged_by'][name]}, now it is {judge[name]}: one table cannot hold both; put "
                                "the former back, or give another run_dir")


def check_same_codes(study: ComparisonConfig, jobs: Iterable[Job], codes: Mapping[str, Any]) -> None:
    """Refuse to add scores to those of other seeds that had other codes of the same path.

    Args:
        study: the study.
        jobs: the runs of one row.
        codes: the hashes of a run's codes, by the names that they have in a line.

    Raises:
        UserError: a line of this row names other ones.
    """
    for (row, seed, *_), line in scored(study, jobs).items():
        for name, value in codes.items():
            if line.get(name, value) != value:
                raise UserError(f"{Path(study.run_dir) / ROWS}: {row}, seed {seed}, had codes with {name} "
                                f"{line[name]}, now it is {value}: one row cannot hold both; put the former codes "
                                "back, or give another run_dir")


def add(study: ComparisonConfig, name: str, line: dict[str, Any]) -> None:
    """Append a line to ``rows.jsonl`` or ``targets.jsonl``."""
    append_line(Path(study.run_dir) / name, json.dumps(sealed(line)))
