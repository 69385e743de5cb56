"""A run on random codes, for checks and measurements: the real task and Trainer, without images or a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mutor_img.common.config import OptimConfig, TrainConfig
from mutor_img.common.files import write_json
from mutor_img.data.store import CodesInfo, block_checksum, code_dtype
from mutor_img.pretraining.config import CodesConfig, GeneratorConfig, ModelSection, RegistersConfig
from mutor_img.pretraining.preflight import Preflight
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.registers import RegisterLaw
from mutor_img.training.runtime import Runtime

IMAGES = 64


def write_random_codes(folder: Path, grid: tuple[int, int], vocabulary: int, classes: int) -> Path:
    """Write a code store of ``IMAGES`` images, one view each, of uniform codes drawn by a fixed seed; returns it.

    One that is there is the same, and stays: a run may be reading it.
    """
    if (folder / "codes.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    codes = draw.integers(0, vocabulary, (IMAGES, 1, grid[0] * grid[1])).astype(code_dtype(vocabulary))
    labels = np.arange(IMAGES, dtype=np.int64) % classes
    np.save(folder / "codes.npy", codes)
    np.save(folder / "labels.npy", labels)
    info = CodesInfo(grid, vocabulary, [str(number) for number in range(classes)], ["plain"], "center",
                     16 * grid[0], "none", "0" * 64, [block_checksum(codes, labels)])
    write_json(folder / "codes.json", info.to_json())
    return folder


def random_run(folder: Path, law: RegisterLaw, *, schema: type[GeneratorConfig] = GeneratorConfig,
               model: dict[str, Any] | None = None, optim: dict[str, Any] | None = None,
               train: dict[str, Any] | None = None, **fields: Any) -> GeneratorConfig:
    """Return the config of a run on random codes, which are written into ``folder``; the run's folder is there too.

    Args:
        folder: a folder of its own.
        law: the registers.
        schema: the config's class.
        model, optim, train: what differs from the defaults of these sections.
        fields: other fields of ``schema``.
    """
    section = ModelSection(grid=law.grid, **(model or {}))
    sizes = *law.grid, section.vocabulary, section.classes
    name = "_".join(map(str, ("codes", *sizes)))
    codes = write_random_codes(folder / name, law.grid, section.vocabulary, section.classes)
    registers = RegistersConfig(law.kind, law.count, law.d_max, list(law.chosen), every=law.every,
                                mixed_offsets=law.mixed, wrap=law.wrap)
    once = {"log_every": 1, "checkpoint_every": 0, "validate_every": 0, "picture_every": 0}
    return schema(run_dir=str(folder / "run"), data=CodesConfig(str(codes)), model=section, registers=registers,
                  optim=OptimConfig(**(optim or {})), train=TrainConfig(**{**once, **(train or {})}), **fields)


def random_task(config: GeneratorConfig, runtime: Runtime) -> GeneratorTask:
    """Return the config's task, which takes FlexAttention for right: it is compared elsewhere, or only timed."""
    task = GeneratorTask(config, runtime)
    if task.wants_flex(runtime.device):
        task.preflight = Preflight("not compared")
    return task

