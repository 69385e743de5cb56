"""What the YAML of a comparison holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mutor_img.common.errors import UserError, check_range, suggest
from mutor_img.metrics.networks import check_features
from mutor_img.metrics.requirements import check_names


@dataclass
class RowConfig:
    """One row of the table: a training run that is repeated with every seed."""

    name: str = ""  # what tables and folders call it
    config: str = ""  # the config of its run; empty: the study's base
    overrides: list[str] = field(default_factory=list)  # what it changes there, as in [registers.kind=2d]
    checkpoints: list[int] = field(default_factory=list)  # updates after which it is scored; empty: the study's
    seeds: list[int] = field(default_factory=list)  # of its runs; empty: the study's


@dataclass
class ComparisonConfig:
    """Rows, seeds, and how each run is judged."""

    run_dir: str = ""  # folder for all outputs; empty: the config's path, with runs/ instead of configs/
    base: str = ""  # the config that rows start from
    rows: list[RowConfig] = field(default_factory=list)  # what is compared: a name, overrides, and perhaps a config
    overrides: list[str] = field(default_factory=list)  # what all rows change, before their own, as in [optim.lr=1e-3]
    baseline: str = ""  # the row that the others are compared with; empty: the first
    seeds: list[int] = field(default_factory=list)  # of training; a run is sampled with the same seed
    checkpoints: list[int] = field(default_factory=list)  # updates after which runs are scored
    guidance: list[float] = field(default_factory=lambda: [1.0])  # guidance scales to score at
    temperature: float = 1.0  # of sampling
    samples: int = 10_000  # N, samples per score
    reference: str = ""  # what evaluate_fid.py --reference takes
    metrics: list[str] = field(default_factory=list)  # some of fid, sfid, is, pr, kid; empty: all possible ones
    features: str = "inception"  # feature network: inception, mnist, classifier, or timm:NAME
    features_weights: str | None = None  # classifier folder, timm weights, or Inception's if not in the default place
    batch_size: int = 64  # images per process at once
    held_out: int = 500  # held-out images for the registers' loss per target; 0: not measured
    grid_images: int = 8  # images of each row in the grid of samples
    budget_hours: float | None = None  # hours that the study may run, all its starts together; null: no limit

    def inputs(self) -> dict[str, Any]:
        """Return every path that a study reads, by its key."""
        return {"base": self.base or None, "rows": [row.config for row in self.rows if row.config],
                "reference": self.reference or None, "features_weights": self.features_weights}

    @property
    def baseline_name(self) -> str:
        """The name of the row that the others are held against."""
        return self.baseline or self.rows[0].name

    def steps(self, row: RowConfig) -> list[int]:
        """Return after which updates a row is scored, ascending."""
        return sorted(row.checkpoints or self.checkpoints)

    def overrides_of(self, row: RowConfig) -> list[str]:
        """Return what a row changes in its config, in order."""
        return [*self.overrides, *row.overrides]

    def seeds_of(self, row: RowConfig) -> list[int]:
        """Return the seeds of a row's runs, in the order in which they are done."""
        return row.seeds or self.seeds

    def validate(self) -> None:
        """Raise :class:`UserError` for a value out of range."""
        self._check_rows()
        check_different("guidance", self.guidance, "as in [1.0, 2.0]")
        self._check_seeds("seeds", self.seeds)
        for scale in self.guidance:
            check_range("guidance", scale, 1.0, 100.0)
        check_range("temperature", self.temperature, 0.0, 1e6, low_open=True)
        check_range("samples", self.samples, 2, 10**9)
        check_range("batch_size", self.batch_size, 1, 100_000)
        check_range("held_out", self.held_out, 0, 10**9)
        check_range("grid_images", self.grid_images, 1, 64)
        if self.budget_hours is not None:
            check_range("budget_hours", self.budget_hours, 0.0, 1e6, low_open=True)
        if not self.reference:
            raise UserError("reference is empty; give what evaluate_fid.py --reference takes")
        check_features(self.features, self.features_weights)
        if self.metrics:
            check_names(self.metrics)
            if "fid" not in self.metrics:
                raise UserError(f"metrics are {self.metrics}; fid must be among them: rows are compared by it")

    def _check_rows(self) -> None:
        if not self.rows:
            raise UserError("rows is empty; give at least one, as in rows: [{name: next-token, overrides: "
                            "[registers.kind=none]}]")
        for place, row in enumerate(self.rows):
            if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", row.name):
                raise UserError(f"rows[{place}].name is {row.name!r}; give letters, digits, and . + - _ in between, "
                                "as in mutor2d-80")
            if not row.config and not self.base:
                raise UserError(f"row {row.name!r} has no config, and base is empty; give the config that rows "
                                "start from, as in base: imagenet256/ntp_b")
            check_different(f"checkpoints of row {row.name!r}", self.steps(row), "as in [100000, 200000]")
            if row.seeds:
                self._check_seeds(f"seeds of row {row.name!r}", row.seeds)
            for step in self.steps(row):
                check_range(f"checkpoints of row {row.name!r}", step, 1, 10**9)
        names = [row.name for row in self.rows]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"rows: the name {name!r} is there {names.count(name)} times; give each row its own")
        if self.baseline and self.baseline not in names:
            raise UserError(f"baseline is {self.baseline!r}, which is no row{suggest(self.baseline, names)}")

    def _check_seeds(self, name: str, seeds: Sequence[int]) -> None:
        check_different(name, seeds, "as in [0, 1, 2]")
        for seed in seeds:
            check_range(name, seed, 0, 2**62)


def check_different(name: str, values: Sequence[Any], example: str) -> None:
    """Raise :class:`UserError` unless there are values, all different."""
    if not values:
        raise UserError(f"{name} is empty; give at least one value, {example}")
    if len(set(values)) < len(values):
        raise UserError(f"{name} is {list(values)}: a value is there twice")
