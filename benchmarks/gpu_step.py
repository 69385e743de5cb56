"""What an update costs on this machine's GPU: time, MFU, idle share, kernels and memory, each beside what is computed.

    python -m benchmarks.gpu_step                                   # B, L and XL with 0, 80 and 256 registers
    python -m benchmarks.gpu_step --presets B --registers 0 --batch 256

Each row is a whole update of a run's Trainer, compiled and in bf16, on random codes of 16 x 16; the time is the median
of ``--rounds``. Idle is the share of it in which the GPU ran nothing: 1 - busy / elapsed, where torch's profiler sums
what was busy in further updates. The computed columns are the cost model's and the plan's (docs/scaling.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mutor_img.blocks import PRESETS
from mutor_img.common.cli import Parser, parse_numbers, run
from mutor_img.common.errors import check_choice, check_range
from mutor_img.pretraining.speed import Speed, forget_all, measure_speed, require_gpu
from mutor_img.registers import RegisterLaw
from mutor_img.training.runtime import Runtime

GRID = (16, 16)
HEADER = ("preset", "registers", "sequences", "ms per update", "images/s", "MFU", "computed for an H100", "idle",
          "kernels", "peak GiB", "computed")


def law_of(registers: int) -> RegisterLaw:
    """Return the law of so many 2D registers: none, one after each input, or some at random places."""
    if not registers:
        return RegisterLaw("none", GRID)
    return RegisterLaw("2d", GRID, 4, None if registers == GRID[0] * GRID[1] else registers)


def cells(preset: str, registers: int, speed: Speed) -> list[str]:
    """Return a row of the table: what is measured, and beside MFU and memory what is computed."""
    return [preset, str(registers), str(speed.sequences), f"{1000 * speed.seconds:.1f}",
            f"{speed.sequences / speed.seconds:.0f}", "-" if speed.mfu is None else f"{speed.mfu:.1%}",
            f"{speed.planned_mfu:.1%}", "-" if speed.idle is None else f"{speed.idle:.1%}", f"{speed.kernels:.0f}",
            "-" if speed.held is None else f"{speed.held:.1f}", f"{speed.planned:.1f}"]


def main(argv: Sequence[str]) -> list[Speed]:
    """Measure every row and print it as it is done, in Markdown; returns what was measured.

    Raises:
        UserError: there is no CUDA device.
    """
    parser = Parser(description="Time, MFU, idle share, kernels and memory of updates on this machine's GPU.",
                    example="python -m benchmarks.gpu_step --presets B,XL --registers 0,80")
    add = parser.add_argument
    add("--presets", default="B,L,XL", metavar="LIST", help="sizes of the transformer, comma-separated")
    add("--registers", default="0,80,256", metavar="LIST", help="registers per sequence, comma-separated")
    add("--batch", type=int, default=128, help="sequences per update, halved until they fit")
    add("--rounds", type=int, default=10, help="updates that are timed")
    args = parser.parse_args(argv)
    check_range("--batch", args.batch, 1, 4096)
    check_range("--rounds", args.rounds, 1, 1000)
    presets = args.presets.split(",")
    for preset in presets:
        check_choice("--presets", preset, PRESETS)
    laws = {registers: law_of(registers) for registers in parse_numbers(args.registers, "--registers", int)}
    runtime = Runtime(require_gpu("these measurements need"))
    print(f"{runtime.devices}, torch {torch.__version__}, median of {args.rounds} updates\n")
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    found = []
    for preset in presets:
        for registers, law in laws.items():
            found.append(measure_speed(runtime, law, preset=preset, batch=args.batch, rounds=args.rounds))
            print(f"| {' | '.join(cells(preset, registers, found[-1]))} |", flush=True)
            forget_all()
    return found


if __name__ == "__main__":
    run(main)
