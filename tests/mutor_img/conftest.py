"""A small code store and a small training run, shared by the tests of training."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from mutor_img import transformer
from mutor_img.codes import CodesInfo, block_checksum
from mutor_img.config import load_config
from mutor_img.files import write_json
from mutor_img.training.generator import GeneratorConfig, GeneratorTask
from mutor_img.training.loop import train
from mutor_img.training.runtime import Runtime

RUN = """
data: {{codes: {codes}, val_codes: {codes}}}
model: {{preset: mnist, grid: [4, 5], vocabulary: 16, classes: 3, dropout: 0.0}}
registers: {{kind: 2d, count: 6, d_max: 3}}
optim: {{lr: 1e-2}}
train: {{steps: 3, global_batch: 4, precision: fp32, compile: false, log_every: 1, checkpoint_every: 1, keep: 9,
         validate_every: 0, picture_every: 0}}
"""


def write_codes(folder: Path, seed: int = 0, images: int = 10, views: int = 2, tokenizer_hash: str = "a" * 64,
                block: int = 10**9) -> Path:
    """Write a valid code store of 4 x 5 grids over 16 codes and 3 classes."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 16, (images, views, 20)).astype(np.uint16)
    labels = np.arange(images, dtype=np.int64) % 3
    np.save(folder / "codes.npy", codes)
    np.save(folder / "labels.npy", labels)
    info = CodesInfo((4, 5), 16, ["a", "b", "c"], ["plain", "mirror"][:views], "center", 32, "tok", tokenizer_hash,
                     [block_checksum(codes[i: i + block], labels[i: i + block]) for i in range(0, images, block)])
    write_json(folder / "codes.json", info.to_json())
    return folder


@pytest.fixture(scope="session")
def processes():
    """Return a context of processes that are forked from one that has imported everything, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mutor_img.training.command"])
    return context


@pytest.fixture(scope="session")
def make_codes():
    """Return :func:`write_codes`."""
    return write_codes


@pytest.fixture
def codes_folder(tmp_path) -> Path:
    return write_codes(tmp_path / "codes")


@pytest.fixture
def run_file(tmp_path, codes_folder) -> Path:
    """A config file of a run of three updates; its run folder is tmp_path / "runs" / "run"."""
    path = tmp_path / "configs" / "run.yaml"
    path.parent.mkdir()
    path.write_text(RUN.format(codes=codes_folder))
    return path


@pytest.fixture
def tiny(monkeypatch):
    """Shrink the presets, for runs in this process."""
    for name in transformer.PRESETS:
        monkeypatch.setitem(transformer.PRESETS, name, (2 if name == "mnist" else 1, 2, 16))


@pytest.fixture
def run_training(run_file, tiny):
    """Return a function that trains the small run with overrides and returns its Trainer."""

    def run(*overrides: str):
        config = load_config(GeneratorConfig, run_file, overrides)
        runtime = Runtime.start(config.train.timeout_minutes)
        return train(GeneratorTask(config, runtime), config, runtime)

    return run
