"""The runs of a comparison: one for each row and seed, in the order in which they are done."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path

from mutor_img.checkpoints.folder import newest_checkpoint, peek_meta
from mutor_img.common.config import load_config
from mutor_img.common.errors import UserError, naming, suggest
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.study.comparison.config import ComparisonConfig, RowConfig
from mutor_img.training.changes import decisive

SET = {"seed": "seeds", "run_dir": "run_dir", "train.milestones": "checkpoints"}  # by the study's key


@dataclass(frozen=True)
class Job:
    """One run of a row.

    Attributes:
        row, seed: which.
        config: of its training, resolved.
        key: sha256 of the settings that decide its weights.
        words: of ``train.py``: ``--config`` and overrides.
        steps: after which updates it is scored, ascending.
    """

    row: str
    seed: int
    config: GeneratorConfig
    key: str
    words: tuple[str, ...]
    steps: tuple[int, ...]

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.row}, seed {self.seed}"

    @property
    def run_dir(self) -> Path:
        """The run's folder. Its name holds the key: a row that is changed gets another one, and the former stays."""
        return Path(self.config.run_dir)

    @property
    def trained(self) -> bool:
        """Whether all its updates are done, as far as can be read: training says what is wrong with a checkpoint."""
        newest = newest_checkpoint(self.run_dir)
        with suppress(UserError):
            return newest is not None and peek_meta(newest)["step"] >= self.config.train.steps
        return False


def all_jobs(study: ComparisonConfig) -> list[Job]:
    """Return all runs: the first seed of every row, then the second one, and so on, so that the table fills evenly.

    Raises:
        UserError: a row's config or overrides that cannot be, or a checkpoint beyond its run; the row is named.
    """
    configs = {row.name: row_config(study, row) for row in study.rows}
    turns = zip_longest(*([(row, seed) for seed in study.seeds_of(row)] for row in study.rows))
    return [make_job(study, row, seed, configs[row.name]) for row, seed in filter(None, chain.from_iterable(turns))]


def row_jobs(study: ComparisonConfig, name: str) -> list[Job]:
    """Return all runs of a row that is there; no other row's config is read."""
    [row] = [one for one in study.rows if one.name == name]
    config = row_config(study, row)
    return [make_job(study, row, seed, config) for seed in study.seeds_of(row)]


def find_job(study: ComparisonConfig, row: str, seed: int) -> Job:
    """Return one run.

    Raises:
        UserError: there is no such row or seed.
    """
    rows = {one.name: one for one in study.rows}
    if row not in rows:
        raise UserError(f"--row {row!r} is no row of this study{suggest(row, rows)}")
    if seed not in (seeds := study.seeds_of(rows[row])):
        raise UserError(f"--seed {seed} is no seed of row {row!r}; it has {', '.join(map(str, seeds))}")
    return make_job(study, rows[row], seed, row_config(study, rows[row]))


def row_config(study: ComparisonConfig, row: RowConfig) -> GeneratorConfig:
    """Return the config of a row's runs, whatever their seed; raises :class:`UserError` as :func:`all_jobs`."""
    for origin, overrides in (("overrides of all rows", study.overrides), (f"row {row.name!r}", row.overrides)):
        for text in overrides:
            if (key := text.partition("=")[0].strip()) in SET:
                raise UserError(f"{origin}: override {text!r}: the study itself sets {key} from its {SET[key]}; leave "
                                "it out")
    with naming(f"row {row.name!r}{' with the overrides of all rows' if study.overrides else ''}"):
        config = load_config(GeneratorConfig, row.config or study.base,
                             [*study.overrides_of(row), _milestones(study, row)])
    if (last := study.steps(row)[-1]) > config.train.steps:
        raise UserError(f"row {row.name!r}: checkpoint {last} lies beyond its run of train.steps={config.train.steps} "
                        "updates; leave it out, or raise train.steps")
    return config


def make_job(study: ComparisonConfig, row: RowConfig, seed: int, config: GeneratorConfig) -> Job:
    """Return the run of a row with one seed, of the row's config."""
    config = replace(config, seed=seed)
    key = run_key(config)
    config.run_dir = str(Path(study.run_dir) / "runs" / f"{row.name}-{seed}-{key[:8]}")
    words = ("--config", row.config or study.base, *study.overrides_of(row), _milestones(study, row), f"seed={seed}",
             f"run_dir={config.run_dir}")
    return Job(row.name, seed, config, key, words, tuple(study.steps(row)))


def _milestones(study: ComparisonConfig, row: RowConfig) -> str:
    return f"train.milestones={json.dumps(study.steps(row), separators=(',', ':'))}"


def run_key(config: GeneratorConfig) -> str:
    """Return the sha256 of the settings that decide a run's weights."""
    settings = decisive(asdict(config), asdict(GeneratorConfig()))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
