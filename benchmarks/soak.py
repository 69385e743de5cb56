"""Hours of training, sampling and scoring in one process: what grows, and what becomes slower.

    python -m benchmarks.soak --hours 2 --plot soak.png

Each round does the same work with models of a few thousand weights, through the commands themselves. What a round
leaves behind, such as memory, open files or threads, adds up over thousands of rounds.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import psutil
import torch
from tqdm import tqdm

from benchmarks.chaos import inputs
from mutor_img import blocks
from mutor_img.common.cli import Parser, run
from mutor_img.common.errors import UserError, check_range
from mutor_img.common.files import append_line, read_lines
from mutor_img.common.locks import claim, file_lock
from mutor_img.evaluation.command import main as score
from mutor_img.pretraining.command import main as train
from mutor_img.sampling.command import main as sample
from mutor_img.training.runtime import Runtime
from tokenizer.encode import encode_images
from tokenizer.images.layouts import open_images

UPDATES, SAMPLES = 100, 64  # per round
CONFIG = """
data: {{codes: {folder}/codes, val_codes: {folder}/codes}}
model: {{preset: mnist, grid: [4, 4], vocabulary: 16, classes: 3, dropout: 0.1}}
registers: {{kind: 2d, count: 6, d_max: 3}}
train: {{steps: {updates}, global_batch: 4, precision: fp32, compile: false, ema: 0.9, log_every: 10,
         checkpoint_every: 50, validate_every: 50, picture_every: 0}}
"""
# What must stay flat: the part of its level by which a quantity may be higher at the end than after the first tenth.
LIMITS = {"resident memory, MiB": 0.05, "open files": 0.0, "threads": 0.0, "training, CPU ms per update": 0.1,
          "sampling, CPU ms per image": 0.1, "scoring, CPU ms per image": 0.1}


def prepare(folder: Path) -> None:
    """Write what the rounds read: codes, images and a classifier, all of them of noise."""
    vq = inputs.write_tokenizer(folder / "tokenizer")
    images = inputs.write_images(folder / "images", count=48)
    encode_images(vq, open_images(images), folder / "codes", runtime=Runtime(torch.device("cpu")))
    inputs.write_classifier(folder / "classifier")
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder, updates=UPDATES))


def one_round(folder: Path, number: int) -> dict[str, float]:
    """Train a model, draw samples of it and score them; returns the quantities of ``LIMITS`` after it.

    Times are of this process's threads, so that they are the same beside other work.
    """
    out = folder / "out"
    seconds = [_cpu_seconds(command, [str(word) for word in words]) for command, words in (
        (train, ("--config", folder / "run.yaml", f"run_dir={out}/run", f"seed={number}")),
        (sample, ("--checkpoint", out / "run", "--num-samples", SAMPLES, "--device", "cpu", "--out", out / "s.npz")),
        (score, ("--samples", out / "s.npz", "--reference", folder / "images", "--features", "classifier",
                 "--features-weights", folder / "classifier", "--device", "cpu", "--json", out / "scores.json")))]
    shutil.rmtree(out)
    process = psutil.Process()
    values = (process.memory_info().rss / 2**20, process.num_fds(), process.num_threads(),
              *(1000 * spent / count for spent, count in zip(seconds, (UPDATES, SAMPLES, SAMPLES), strict=True)))
    return dict(zip(LIMITS, values, strict=True))


def _cpu_seconds(command: Callable[[Sequence[str]], object], words: list[str]) -> float:
    begun = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        command(words)
    return time.process_time() - begun


class Levels(NamedTuple):
    """A quantity in the second tenth of the rounds and in the last; in the first tenth caches fill.

    Attributes:
        begin: median over the second tenth.
        end: median over the last tenth.
        limit: part of ``begin`` by which ``end`` may be higher.
    """

    begin: float
    end: float
    limit: float

    @property
    def grew(self) -> bool:
        """Whether the quantity is higher at the end than it may be."""
        return self.end > self.begin * (1 + self.limit)


def levels(rows: Sequence[dict[str, float]]) -> dict[str, Levels]:
    """Return each quantity at the beginning and at the end of the rounds.

    Raises:
        UserError: fewer than 30 rounds: the median of a tenth would mean nothing.
    """
    if len(rows) < 30:
        raise UserError(f"{len(rows)} rounds are too few to say what grew; give --hours for 30 or more")
    tenth = len(rows) // 10
    return {name: Levels(median(row[name] for row in rows[tenth: 2 * tenth]),
                         median(row[name] for row in rows[-tenth:]), limit) for name, limit in LIMITS.items()}


def plot(path: str, rows: Sequence[dict[str, float]]) -> None:
    """Draw each quantity over the hours."""
    from matplotlib.figure import Figure

    figure = Figure((10, 5), layout="constrained")
    hours = [row["hours"] for row in rows]
    for name, axes in zip(LIMITS, figure.subplots(2, 3).flat, strict=True):
        values = [row[name] for row in rows]
        axes.plot(hours, values, ".", markersize=2, alpha=0.4, rasterized=True)
        axes.set(title=name, xlabel="hours", ylim=(0, 1.5 * float(np.percentile(values, 99))))
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> int:
    """Do rounds for some hours, then print what grew; returns how many quantities grew by more than they may."""
    parser = Parser(description="Train, sample and score in one process for hours, at small size: memory, open files, "
                    "threads and times must stay as they are.", example="python -m benchmarks.soak --hours 2")
    parser.add_argument("--hours", type=float, default=2.0, help="how long")
    parser.add_argument("--out", default="runs/soak.jsonl", metavar="FILE", help="file with a line per round")
    parser.add_argument("--plot", metavar="FILE", help="picture to write")
    args = parser.parse_args(argv)
    check_range("--hours", args.hours, 0.001, 1000)
    torch.set_num_threads(1)
    blocks.PRESETS["mnist"] = (2, 2, 16)
    with claim(file_lock(args.out, keeps=True)), tempfile.TemporaryDirectory() as folder:
        Path(args.out).unlink(missing_ok=True)
        prepare(Path(folder))
        _rounds(Path(folder), args.hours, args.out)
    rows = read_lines(args.out)
    if args.plot:
        plot(args.plot, rows)
    found = levels(rows)
    print(f"{len(rows)} rounds in {rows[-1]['hours']:.2f} hours\n{'':<30}{'second tenth':>14}{'last tenth':>12}")
    for name, level in found.items():
        print(f"{name:<30}{level.begin:>14.1f}{level.end:>12.1f}{'  GREW' * level.grew}")
    return sum(level.grew for level in found.values())


def _rounds(folder: Path, hours: float, out: str) -> None:
    begun, number = time.monotonic(), 0
    with tqdm(total=round(3600 * hours), unit="s", disable=None) as bar:
        while (elapsed := time.monotonic() - begun) < 3600 * hours:
            append_line(out, json.dumps({"hours": elapsed / 3600, **one_round(folder, number)}))
            number += 1
            bar.update(int(time.monotonic() - begun) - bar.n)


if __name__ == "__main__":
    run(lambda argv: sys.exit(min(1, main(argv))))
