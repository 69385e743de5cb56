"""Images per second of ``tokenizer.encode``: batches of 1 and 8, one process and two, VQ-16 at 256 pixels.

    python -m benchmarks.encode                           # random weights, 16 random JPEGs of 400 x 350 pixels
    python -m benchmarks.encode --images imagenet/val --labels LOC_val_solution.csv --count 64 --rounds 5

Processes are started by this command and joined by gloo on the CPU, with one thread each; with one process there is
one thread too, so that two processes may be held against it on a machine of two cores. Every variant encodes the same
images into a folder that is removed; in each round all of them run once, and the table shows medians. Processor seconds
are the measure on a machine that does other things too. "plain loop" is one image at a time, unpadded, through the same
network: what the batched way must not be slower than.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from benchmarks.turns import processor
from mutor_img.common.cli import Parser, run
from mutor_img.common.errors import check_range
from mutor_img.training.hardware import keep_freed_memory
from mutor_img.training.runtime import Runtime
from tokenizer.encode import encode_images
from tokenizer.images.crops import center_rule, read_squares, to_float
from tokenizer.images.folder import ImageFolder
from tokenizer.images.layouts import open_images
from tokenizer.network.vq import VQModel, preset

VARIANTS = {"plain loop": (0, 1), "batch 1": (1, 1), "batch 8": (8, 1), "batch 8, 2 processes": (8, 2)}


def write_images(folder: Path, count: int) -> None:
    """Write JPEGs of smooth random colours, of the size of a typical ImageNet photograph."""
    (folder / "class").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 14, 3), dtype=np.uint8))
        coarse.resize((400, 350), Image.Resampling.BICUBIC).save(folder / "class" / f"{number:05d}.jpg", quality=90)


def part_of(source: ImageFolder, count: int) -> ImageFolder:
    """Return the first ``count`` images of files in folders."""
    return replace(source, files=source.files[:count], sizes=source.sizes[:count], labels=source.labels[:count])


def plain_loop(vq: VQModel, source: ImageFolder, size: int) -> None:
    """Encode one image and its mirror image at a time."""
    with torch.no_grad():
        for number in range(len(source)):
            pixels = to_float(read_squares(source, number, vq.image_channels, size, center_rule()))
            for seen in (pixels, pixels.flip(-1)):
                vq.quantize(vq.latents(seen))


def process(rank: int, world: int, port: int, settings: dict[str, Any], results: Any) -> None:
    """Run once, as one of ``world`` processes, the variants that have as many; puts wall and processor seconds."""
    torch.set_num_threads(1)
    keep_freed_memory()
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(minutes=30))
    torch.manual_seed(0)
    vq = VQModel(**preset(settings["preset"])).eval().requires_grad_(False)
    vq.image_size, vq.path, vq.hash = settings["size"], "random weights", "0" * 64
    source = part_of(open_images(settings["images"], labels=settings["labels"]), settings["count"])
    runtime, out = Runtime(torch.device("cpu"), rank, world), Path(settings["out"])
    for name, (batch, processes) in VARIANTS.items():
        if processes != world:
            continue
        runtime.barrier()
        begun, busy = time.perf_counter(), time.process_time()
        if batch:
            encode_images(vq, source, out / name, runtime=runtime, batch_size=batch)
        else:
            plain_loop(vq, source, settings["size"])
        results.put((name, time.perf_counter() - begun, time.process_time() - busy))
    if world > 1:
        dist.destroy_process_group()


def measure(settings: dict[str, Any], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return (wall, processor seconds over all processes) of every round by variant, with new processes each round."""
    context = multiprocessing.get_context("spawn")
    results, found = context.Queue(), {name: [] for name in VARIANTS}
    for turn in range(rounds):
        for world in (1, 2):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            once = {**settings, "out": str(Path(settings["out"]) / f"{turn}_{world}")}
            started = [context.Process(target=process, args=(rank, world, port, once, results))
                       for rank in range(world)]
            for one in started:
                one.start()
            names = [name for name, (_, processes) in VARIANTS.items() if processes == world]
            taken = [results.get(timeout=3600) for _ in range(world * len(names))]
            for name in names:
                found[name].append((max(wall for n, wall, _ in taken if n == name),
                                    sum(busy for n, _, busy in taken if n == name)))
            for one in started:
                one.join()
    return found


def main(argv: Sequence[str]) -> dict[str, float]:
    """Time the variants and print a table; returns images per second by name."""
    parser = Parser(description="Images per second of tokenizer.encode, two views each, on this machine's CPU.",
                    example="python -m benchmarks.encode --count 32 --rounds 3")
    parser.add_argument("--images", help="images to encode, as tokenizer.encode takes them (random ones unless given)")
    parser.add_argument("--labels", metavar="FILE", help="labels of images that are in one folder")
    parser.add_argument("--preset", default="vq16", help="size of the tokenizer")
    parser.add_argument("--image-size", type=int, default=256, help="pixels per side")
    parser.add_argument("--count", type=int, default=16, help="images encoded by each variant, 4096 at most")
    parser.add_argument("--rounds", type=int, default=2, help="how often each variant is timed")
    args = parser.parse_args(argv)
    check_range("--count", args.count, 2, 4096)
    check_range("--rounds", args.rounds, 1, 1000)
    preset(args.preset)
    with tempfile.TemporaryDirectory() as folder:
        if args.images is None:
            write_images(Path(folder) / "images", args.count)
        settings = {"images": args.images or f"{folder}/images", "labels": args.labels, "preset": args.preset,
                    "size": args.image_size, "count": args.count, "out": f"{folder}/codes"}
        print(f"{processor()}, 1 thread per process, torch {torch.__version__}; {args.preset}, "
              f"{args.image_size} pixels, {args.count} images, 2 views each", flush=True)
        found = measure(settings, args.rounds)
    rates = {name: args.count / statistics.median(wall for wall, _ in times) for name, times in found.items()}
    print(f"{'variant':<24}{'images/s':>10}{'ratio to plain loop':>22}{'processor s per image':>23}")
    for name, rate in rates.items():
        busy = statistics.median(busy for _, busy in found[name]) / args.count
        print(f"{name:<24}{rate:>10.3f}{rate / rates['plain loop']:>22.2f}{busy:>23.3f}")
    return rates


if __name__ == "__main__":
    run(main)
