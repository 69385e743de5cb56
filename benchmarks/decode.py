"""Images per second of the tokenizer's decoder on CPUs, by images per pass and memory layout, VQ-16 at 256 pixels.

    python -m benchmarks.decode                                           # 1, 2 and 4 images per pass
    python -m benchmarks.decode --per-pass 1,8 --image-size 128 --rounds 8

All variants decode the same random codes with random weights. In each round all of them run once, every other round
backwards; the table shows medians. Processor seconds are the measure on a machine that does other things too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from benchmarks.turns import processor
from mutor_img.common.cli import Parser, parse_numbers, run
from mutor_img.common.errors import check_range
from mutor_img.training.hardware import keep_freed_memory
from tokenizer.network.vq import VQModel, preset


def decode(vq: VQModel, codes: Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """Return the images (B, C, H, W) of codes (B, N), ``count`` per pass, from latents in plain layout."""
    return torch.cat([vq.pixels(vq.quantize.lookup(part, grid).contiguous()) for part in codes.split(count)])


def main(argv: Sequence[str]) -> None:
    """The command; see ``--help``."""
    parser = Parser(description="Images per second of the tokenizer's decoder, by images per pass, on this machine's "
                    "CPU.", example="python -m benchmarks.decode --per-pass 1,2,4,8 --threads 2")
    parser.add_argument("--preset", default="vq16", help="size of the tokenizer")
    parser.add_argument("--image-size", type=int, default=256, help="pixels per side")
    parser.add_argument("--per-pass", default="1,2,4", help="images per pass, comma-separated")
    parser.add_argument("--rounds", type=int, default=4, help="how often each variant is timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args(argv)
    counts = parse_numbers(args.per_pass, "--per-pass", int)
    for name, value in (("--rounds", args.rounds), ("--threads", args.threads),
                        *(("--per-pass", count) for count in counts)):
        check_range(name, value, 1, 1000)
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    plain = VQModel(**preset(args.preset)).eval().requires_grad_(False)
    networks = {"plain": plain, "channels last": deepcopy(plain).to(memory_format=torch.channels_last)}
    grid, images = plain.grid_for(args.image_size), max(counts)
    codes = torch.randint(plain.vocabulary, (images, grid[0] * grid[1]))
    variants = [(layout, count) for layout in networks for count in counts]
    times, made = {variant: [] for variant in variants}, {}
    with torch.inference_mode():
        decode(plain, codes[:1], grid, 1)  # warms up
        for turn in range(args.rounds):
            for layout, count in variants[:: -1 if turn % 2 else 1]:
                begun, busy = time.perf_counter(), time.process_time()
                made[layout, count] = decode(networks[layout], codes, grid, count)
                times[layout, count].append((time.perf_counter() - begun, time.process_time() - busy))
    print(f"{processor()}, threads: {args.threads}, torch {torch.__version__}; {args.preset}, {args.image_size} pixels")
    print(f"{'layout':<16}{'per pass':>10}{'images/s':>10}{'processor s per image':>23}{'largest difference':>20}")
    for (layout, count), taken in times.items():
        wall, busy = (statistics.median(each) / images for each in zip(*taken))
        difference = float((made[layout, count] - made[variants[0]]).abs().max())
        print(f"{layout:<16}{count:>10}{1 / wall:>10.3f}{busy:>23.3f}{difference:>20.1e}")


if __name__ == "__main__":
    run(main)
