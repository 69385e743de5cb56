"""What loading costs: checking a code store, and a batch of codes against a training step.

    python -m benchmarks.loading                          # an ImageNet-sized store of random codes, 1.3 GB in /tmp
    python -m benchmarks.loading --images 100000 --step-batch 2

The step is B's with 80 registers on this machine's CPU, timed on a few sequences and taken in proportion. The paper's
GPU step (0.16 s for next-token prediction, 128 sequences on each of 8 GPUs) was not measured here: the share of it
is computed, from the loading time of 128 sequences.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.train_step import make_trainer
from benchmarks.turns import processor, seconds
from mutor_img.common.cli import Parser, run
from mutor_img.common.errors import check_range
from mutor_img.common.files import write_json
from mutor_img.data.order import TrainingCodes
from mutor_img.data.store import BLOCK, Codes, CodesInfo, block_checksum
from mutor_img.registers import RegisterLaw

GRID, VOCABULARY, CLASSES, VIEWS = (16, 16), 16384, 1000, 2
BATCH, GPU_BATCH, GPU_STEP = 1024, 128, 0.16  # the paper's global batch, its share of a GPU, seconds per step


def write_store(folder: Path, images: int) -> Codes:
    """Write a store of random codes in ImageNet's shape, block by block."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    labels = np.arange(images, dtype=np.int64) * CLASSES // images
    np.save(folder / "labels.npy", labels)
    codes = np.lib.format.open_memmap(folder / "codes.npy", mode="w+", dtype=np.uint16,
                                      shape=(images, VIEWS, GRID[0] * GRID[1]))
    checksums = []
    for first in range(0, images, BLOCK):
        part = slice(first, min(first + BLOCK, images))
        codes[part] = draw.integers(0, VOCABULARY, (part.stop - first, *codes.shape[1:]), dtype=np.uint16)
        checksums.append(block_checksum(codes[part], labels[part]))
    codes.flush()
    info = CodesInfo(GRID, VOCABULARY, [str(i) for i in range(CLASSES)], ["plain", "mirror"], "center", 256, "random",
                     "0" * 64, checksums)
    write_json(folder / "codes.json", info.to_json())
    return Codes(folder)


def batch_seconds(data: TrainingCodes, size: int, batches: int) -> float:
    """Return the median seconds of a batch of ``size`` samples; the first, which draws the permutation, is left out."""
    data.batch(np.arange(size))
    return statistics.median(seconds(lambda i=i: data.batch(np.arange(i * size, (i + 1) * size)))
                             for i in range(1, batches + 1))


def main(argv: Sequence[str]) -> dict[str, float]:
    """Time and print; returns the loader's share of the CPU's step and of the paper's GPU step."""
    parser = Parser(description="Cost of checking a code store and of loading batches, beside a training step of B.",
                    example="python -m benchmarks.loading --images 100000")
    parser.add_argument("--images", type=int, default=1_281_167, help="images in the store; ImageNet's 1281167 take "
                        "1.3 GB of temporary disk")
    parser.add_argument("--batches", type=int, default=50, help="batches timed; an epoch of them at most")
    parser.add_argument("--step-batch", type=int, default=4, help="sequences of the CPU's training step")
    parser.add_argument("--steps", type=int, default=3, help="training steps timed; 0: none")
    args = parser.parse_args(argv)
    check_range("--images", args.images, CLASSES, 10**8)
    check_range("--batches", args.batches, 1, 10**6)
    check_range("--step-batch", args.step_batch, 1, BATCH)
    check_range("--steps", args.steps, 0, 10**6)
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {args.images} images, {VIEWS} "
          "views of 256 codes", flush=True)
    shares = {}
    with tempfile.TemporaryDirectory() as folder:
        codes = write_store(Path(folder) / "codes", args.images)
        size = codes.codes.nbytes + codes.labels.nbytes
        print(f"open                    {1e3 * seconds(lambda: Codes(codes.folder)):.1f} ms")
        checked = seconds(codes.verify)
        print(f"verify every block      {checked:.2f} s for {size / 1e9:.2f} GB, just written "
              f"({size / checked / 1e9:.2f} GB/s)")
        data = TrainingCodes([codes], seed=0)
        print(f"an epoch's order        {1e3 * seconds(lambda: data.order.items(np.arange(1))):.1f} ms, once per epoch")
        mixed = TrainingCodes([codes, Codes(codes.folder)], seed=0)
        whole, share = batch_seconds(data, BATCH, args.batches), batch_seconds(data, GPU_BATCH, args.batches)
        print(f"a batch of {BATCH}         {1e3 * whole:.2f} ms; from two stores "
              f"{1e3 * batch_seconds(mixed, BATCH, args.batches):.2f} ms")
        print(f"a batch of {GPU_BATCH}          {1e3 * share:.2f} ms")
    shares["gpu"] = share / GPU_STEP
    print(f"share of a GPU's step   {shares['gpu']:.2%} of the paper's {GPU_STEP} s for {GPU_BATCH} sequences per GPU "
          "(computed, not measured)")
    if args.steps:
        with tempfile.TemporaryDirectory() as folder:
            law = RegisterLaw("2d", GRID, 4, 80)
            step = make_trainer(Path(folder), "B", law, args.step_batch, "bf16", compiled=False).update
            step()
            measured = statistics.median(seconds(step) for _ in range(args.steps)) * BATCH / args.step_batch
        shares["cpu"] = whole / measured
        print(f"share of the CPU's step {shares['cpu']:.5%} of {measured:.0f} s for {BATCH} sequences with 80 "
              f"registers (from {args.step_batch})")
    return shares


if __name__ == "__main__":
    run(main)
