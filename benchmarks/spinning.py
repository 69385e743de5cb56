"""How long OpenMP's threads should spin: the project's work under several settings, idle and beside a busy neighbour.

    python -m benchmarks.spinning --rounds 5

OpenMP reads its settings when it is loaded, so that each is measured in processes of its own. A round runs every
setting once beside each neighbour, in an order that rotates; the table shows medians over rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.train_step import make_trainer
from benchmarks.turns import measure, per_second, processor
from mutor_img import generate
from mutor_img.blocks import ModelConfig
from mutor_img.common.cli import Parser, run
from mutor_img.common.config import OptimConfig
from mutor_img.common.errors import check_range
from mutor_img.common.threads import CHOICES, LONG, NEVER, OURS
from mutor_img.registers import RegisterLaw
from mutor_img.training.hardware import keep_freed_memory, precision_on
from mutor_img.training.optimizer import build_optimizer
from mutor_img.transformer import Transformer
from tokenizer.network.vq import VQModel, preset

SETTINGS = {"default": {"KMP_BLOCKTIME": "200"},  # its own default, which libgomp does not read
            "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
            **{f"{count:,} turns": {"GOMP_SPINCOUNT": str(count)} for count in (1000, 10_000, 100_000)}}
BUSY = [sys.executable, "-c", "while True: pass"]
NEIGHBOURS = {"idle": [], "a busy loop": [BUSY], "two busy loops, nice 10": [["nice", "-n", "10", *BUSY]] * 2}
DEMO = RegisterLaw("2d", (8, 8), 4, 20)


def tokenizer_step() -> Callable[[], object]:
    """Return one training step of the demo's tokenizer on 32 random images."""
    model = VQModel(**preset("mnist")).train()
    optimizer = build_optimizer(model, OptimConfig())
    images = torch.rand(32, 1, 32, 32).mul(2).sub(1).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        reconstruction, quantised = model(images)
        (nn.functional.mse_loss(reconstruction, images) + sum(quantised.losses.values())).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def works(folder: Path) -> dict[str, Callable[[], object]]:
    """Return what is measured, by name; each call is one unit of it. ``folder`` must stay until the last call."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("tiny", grid=(8, 8), vocabulary=256, classes=10)).eval()
    nn.init.normal_(model.output.weight, std=0.02)
    vq = VQModel(**preset("mnist")).eval().requires_grad_(False)
    precision = precision_on(torch.device("cpu"), "auto")
    labels, images = torch.arange(16) % 10, torch.rand(256, 1, 32, 32).mul(2).sub(1)
    return {
        "demo: tokenizer updates": tokenizer_step,
        "demo: generator updates": lambda: make_trainer(folder / "demo", "tiny", DEMO, 8, precision, True,
                                                        vocabulary=256).update,
        "demo: 16 samples": lambda: lambda: generate(model, labels, cfg_scale=2.0),
        "demo: 256 images encoded": lambda: lambda: vq.encode(images),
        "B: updates of 4": lambda: make_trainer(folder / "B", "B", RegisterLaw("none", (16, 16)), 4, precision,
                                                False).update,
    }


def rates_here(seconds: float, only: str) -> dict[str, float]:
    """Return units per second of each work whose name begins with ``only``: calls within about ``seconds``.

    One call before them warms up.
    """
    keep_freed_memory()
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, build in works(Path(folder)).items():
            if not name.startswith(only):
                continue
            rates[name] = per_second(build(), seconds)
    return rates


@contextmanager
def beside(commands: Sequence[Sequence[str]]) -> Iterator[None]:
    """Keep processes running in here."""
    running = [subprocess.Popen(command) for command in commands]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measured(setting: dict[str, str], seconds: float, only: str) -> dict[str, float]:
    """Run :func:`rates_here` in a process of its own under one setting."""
    clean = {name: value for name, value in os.environ.items() if name not in (*CHOICES, OURS)}
    words = ["benchmarks.spinning", "--measure", "--seconds", str(seconds)]
    return measure([*words, *["--only", only] * bool(only)], clean | setting)


def main(argv: Sequence[str]) -> None:
    """Measure every setting and print a table."""
    parser = Parser(description="The project's work under several settings of OpenMP's spinning, on this machine.",
                    example="python -m benchmarks.spinning --rounds 5")
    parser.add_argument("--rounds", type=int, default=3, help="times each setting is measured beside each neighbour")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per work in each measurement")
    parser.add_argument("--only", default="", metavar="TEXT", help="measure only works whose names begin so: demo, B")
    parser.add_argument("--measure", action="store_true", help="measure under this process's environment; print JSON")
    args = parser.parse_args(argv)
    check_range("--rounds", args.rounds, 1, 1000)
    check_range("--seconds", args.seconds, 0.1, 1000)
    if args.measure:
        print(json.dumps(rates_here(args.seconds, args.only)))
        return
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {args.rounds} rounds; the "
          f"project's own setting: GOMP_SPINCOUNT={LONG['GOMP_SPINCOUNT']}, or {NEVER['GOMP_SPINCOUNT']} where other "
          "work uses the processors", flush=True)
    names, found = list(SETTINGS), {}
    with tqdm(total=args.rounds * len(NEIGHBOURS) * len(names), unit="process", disable=None) as bar:
        for turn in range(args.rounds):
            for neighbour, commands in NEIGHBOURS.items():
                for name in names[turn % len(names):] + names[: turn % len(names)]:
                    with beside(commands):
                        for work, rate in measured(SETTINGS[name], args.seconds, args.only).items():
                            found.setdefault((work, neighbour), {}).setdefault(name, []).append(rate)
                    bar.update()
    print(f"{'per second':<28}{'beside':<26}" + "".join(f"{name:>15}" for name in names))
    for (work, neighbour), rates in found.items():
        print(f"{work:<28}{neighbour:<26}" + "".join(f"{statistics.median(rates[name]):>15.2f}" for name in names))


if __name__ == "__main__":
    run(main)
