"""What registers cost: one training step with them against the next-token step, in interleaved rounds.

    python -m benchmarks.train_step                       # B, batch 4, N = 256, bf16: the paper's comparison
    python -m benchmarks.train_step --preset tiny --batch 64 --rounds 9
    python -m benchmarks.train_step --against public      # the next-token step beside that of public code
    python -m benchmarks.train_step --compare-ranks --only none  # what train.check_ranks_every costs, and nothing else

A round times every variant once, in an order that rotates; the ratios are medians over rounds of the same round's
times, so that a machine that speeds up or slows down touches both sides. A step is an update of a run's Trainer:
reading random codes, drawing registers, forward, backward, clipping and the optimiser. Against public code
(benchmarks/public.py) each measurement is a process of its own, and both keep freed memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.public import PublicTransformer, training_step
from benchmarks.turns import forward_flops, in_turn, median_of, per_second, processor, product_peak, seconds
from mutor_img.blocks import LLAMAGEN_PRESETS, ModelConfig
from mutor_img.common.cli import Parser, run
from mutor_img.common.config import TrainConfig
from mutor_img.common.errors import UserError, check_choice, check_range
from mutor_img.pretraining.rehearsal import random_run, random_task
from mutor_img.registers import RegisterLaw
from mutor_img.training.hardware import keep_freed_memory
from mutor_img.training.runtime import Runtime
from mutor_img.training.trainer import Trainer

GRID, VOCABULARY, CLASSES = (16, 16), 16384, 1000
COMPARISON = "the comparison of copies"


def variants(grid: tuple[int, int]) -> dict[str, RegisterLaw]:
    """Return the laws to time by name; the first is what the others are held against."""
    sparse = int(grid[0] * grid[1] * 80 / 256)
    laws = {"next-token": RegisterLaw("none", grid), f"{grid[0] * grid[1]} registers": RegisterLaw("2d", grid, 4),
            f"{sparse} registers": RegisterLaw("2d", grid, 4, sparse)}
    # "next-token at 2N" is plain causal attention at twice the length: what dense registers would cost without a mask.
    laws["next-token at 2N"] = RegisterLaw("none", (2 * grid[0], grid[1]))
    for d_max in (2, 8):
        if d_max <= min(grid) and RegisterLaw("2d", grid, d_max).largest_count >= sparse:
            laws[f"{sparse} registers, d_max {d_max}"] = RegisterLaw("2d", grid, d_max, sparse)
    return laws


def make_trainer(folder: Path, preset: str, law: RegisterLaw, batch: int, precision: str, compiled: bool,
                 vocabulary: int = VOCABULARY) -> Trainer:
    """Return the Trainer of a run whose updates are of ``batch`` random sequences; its files are in ``folder``."""
    config = random_run(folder, law, model={"preset": preset, "vocabulary": vocabulary, "classes": CLASSES},
                        train={"global_batch": batch, "precision": precision, "compile": compiled})
    runtime = Runtime(torch.device("cpu"))
    return Trainer(random_task(config, runtime), config, runtime)


def make_comparison(trainer: Trainer) -> tuple[Callable[[], object], int]:
    """Return a function that compares a run's tensors as it does among processes, and the bytes that it reads.

    The group of processes is this one alone: what travels among several is one number for each tensor.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def compare() -> None:
        alone, trainer.runtime = trainer.runtime, Runtime(torch.device("cpu"), 0, 2)  # one process compares nothing
        try:
            trainer.compare_ranks()
        finally:
            trainer.runtime = alone

    weights = sum(weight.numel() * weight.element_size() for weight in trainer.model.parameters())
    return compare, weights * (3 + (trainer.ema is not None))  # AdamW has two moments for each weight


def measure(who: str, args: argparse.Namespace) -> dict[str, float]:
    """Return image tokens per second of our next-token step or the public one, and its share of the product peak."""
    keep_freed_memory()
    config = ModelConfig.preset(args.preset, grid=side(args.preset), vocabulary=VOCABULARY, classes=CLASSES)
    peak = product_peak(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        if who == "ours":
            law = RegisterLaw("none", config.grid)
            step = make_trainer(Path(folder), args.preset, law, args.batch, args.dtype, args.compile).update
        else:
            model = PublicTransformer(config.layers, config.heads, config.dim, config.hidden, config.grid[0],
                                      VOCABULARY, CLASSES)
            if args.compile:
                model.compile()
            step = training_step(model, args.batch, args.dtype == "bf16")
        rate = args.batch * per_second(step, args.seconds)
    return {"tokens per second": rate * config.length, "share of the peak": rate * 3 * forward_flops(config) / peak}


def against_public(args: argparse.Namespace) -> dict[str, float]:
    """Measure both in turn and print a table; returns the median over rounds of ours over the public one's rate."""
    words = ["benchmarks.train_step", "--preset", args.preset, "--batch", str(args.batch), "--dtype", args.dtype,
             "--seconds", str(args.seconds), *["--compile"] * args.compile]
    found = in_turn({who: [*words, "--measure", who] for who in ("ours", "public")}, args.rounds)
    print(f"{'':<10}{'tokens/s':>10}{'of the peak of matrix products':>32}")
    for who, rows in found.items():
        print(f"{who:<10}{median_of(rows, 'tokens per second'):>10.0f}{median_of(rows, 'share of the peak'):>31.1%}")
    ratios = [mine["tokens per second"] / its["tokens per second"] for mine, its in zip(*found.values())]
    print(f"ours over public, pair by pair: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; median "
          f"{statistics.median(ratios):.2f}")
    return {"ours": statistics.median(ratios)}


def side(preset: str) -> tuple[int, int]:
    """Return the grid that a preset is timed on."""
    return GRID if preset in LLAMAGEN_PRESETS else (8, 8)


def main(argv: Sequence[str]) -> dict[str, float]:
    """The command; see ``--help``. Returns median ratios by name."""
    parser = Parser(description="Cost of registers in a training step on this machine's CPU, or the step "
                    "beside that of public code.",
                    example="python -m benchmarks.train_step --rounds 5")
    parser.add_argument("--preset", default="B", help="size of the transformer")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--rounds", type=int, default=5, help="how often each variant is timed")
    parser.add_argument("--dtype", default="bf16", help="bf16 (autocast over fp32 weights) or fp32")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, as training does")
    parser.add_argument("--compare-ranks", action="store_true", help="also time the comparison of all weights, moments "
                        "and averages that train.check_ranks_every asks for")
    parser.add_argument("--only", default="", metavar="TEXT", help="time only variants with this in their name")
    parser.add_argument("--against", metavar="public", help="time the next-token step beside that of public code, in "
                        "processes of their own")
    parser.add_argument("--seconds", type=float, default=10.0, help="with --against: seconds per measurement")
    parser.add_argument("--measure", metavar="WHO", help="measure ours or public in this process; print JSON")
    args = parser.parse_args(argv)
    check_choice("--against", args.against or "public", ("public",))
    check_choice("--measure", args.measure or "ours", ("ours", "public"))
    check_range("--seconds", args.seconds, 0.1, 1000)
    check_range("--batch", args.batch, 1, 4096)
    check_range("--rounds", args.rounds, 1, 1000)
    check_choice("--dtype", args.dtype, ("bf16", "fp32"))
    if args.measure:
        print(json.dumps(found := measure(args.measure, args)))
        return found
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {args.preset}, batch "
          f"{args.batch}, {args.dtype}, {'compiled' if args.compile else 'eager'}", flush=True)
    return against_public(args) if args.against else register_costs(args)


def register_costs(args: argparse.Namespace) -> dict[str, float]:
    """Time the variants and print a table; returns the median ratio to the first by name."""
    grid = side(args.preset)
    laws = {name: law for i, (name, law) in enumerate(variants(grid).items()) if i == 0 or args.only in name}
    if len(laws) == 1 and not args.compare_ranks:
        raise UserError(f"--only {args.only!r} matches none of {', '.join(variants(grid))}")
    keep_freed_memory()  # as the training loop does
    with tempfile.TemporaryDirectory() as folder:  # a step reads its codes from there
        trainers = {name: make_trainer(Path(folder) / str(i), args.preset, law, args.batch, args.dtype, args.compile)
                    for i, (name, law) in enumerate(laws.items())}
        steps: dict[str, Callable[[], object]] = {name: trainer.update for name, trainer in trainers.items()}
        if args.compare_ranks:
            steps[COMPARISON], read = make_comparison(next(iter(trainers.values())))
        names, times = list(steps), {name: [] for name in steps}  # seconds
        for turn in range(args.rounds + 1):  # the first round warms up
            for name in names[turn % len(names):] + names[: turn % len(names)]:
                taken = seconds(steps[name])
                if turn:
                    times[name].append(taken)
    base = times[names[0]]
    ratios = {name: statistics.median(t / b for t, b in zip(times[name], base)) for name in names}
    print(f"{'variant':<28}{'s per step':>10}{'ratio':>8}{'tokens/s':>10}")
    for name in laws:
        median = statistics.median(times[name])
        print(f"{name:<28}{median:>10.3f}{ratios[name]:>8.2f}{args.batch * laws[name].length / median:>10.0f}")
    if args.compare_ranks:
        dist.destroy_process_group()
        every = TrainConfig().check_ranks_every
        print(f"{COMPARISON}: {statistics.median(times[COMPARISON]):.3f} s for {read / 2**30:.2f} GiB; once in {every} "
              f"updates, {100 * ratios[COMPARISON] / every:.5f} % of their time")
    return ratios


if __name__ == "__main__":
    run(main)
