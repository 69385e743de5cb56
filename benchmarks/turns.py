"""Measurements in processes of their own, taken in turn, and the machine that they are taken on."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from mutor_img.blocks import ModelConfig
from mutor_img.transformer import Transformer

CPU = torch.device("cpu")


def processor() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def measure(words: Sequence[str], setting: dict[str, str] | None = None) -> dict[str, float]:
    """Run ``python -m ...`` in a new process; returns the JSON object of its last line.

    Args:
        words: the module and its flags.
        setting: the environment; this process's if None.
    """
    done = subprocess.run([sys.executable, "-m", *words], env=setting, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(commands: dict[str, Sequence[str]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Return what :func:`measure` gives for each command in each round, by name; every other round goes backwards."""
    found = {name: [] for name in commands}
    with tqdm(total=rounds * len(commands), unit="process", disable=None) as bar:
        for turn in range(rounds):
            for name in list(commands)[:: -1 if turn % 2 else 1]:
                found[name].append(measure(commands[name]))
                bar.update()
    return found


def seconds(work: Callable[[], object]) -> float:
    """Return how long ``work()`` takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def per_second(work: Callable[[], object], seconds: float) -> float:
    """Return calls per second within about ``seconds``, after one call that warms up."""
    work()
    begun, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begun) < seconds or not calls:
        work()
        calls += 1
    return calls / elapsed


def wait_for(device: torch.device) -> None:
    """Return once a device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward_flops(config: ModelConfig) -> float:
    """Return the FLOPs of a forward pass over one sequence without registers."""
    with torch.device("meta"):
        return Transformer(config).forward_flops(config.length)


def product_peak(dtype: torch.dtype, rows: int = 1024, device: torch.device = CPU) -> float:
    """Return the FLOP/s of the machine's matrix product of (rows, 1024) by (1024, 4096): the best of five."""
    a, b = torch.randn(rows, 1024, device=device).to(dtype), torch.randn(4096, 1024, device=device).to(dtype).T

    repeats = max(1, 1024 // rows)

    def products() -> None:
        for _ in range(repeats):
            a @ b
        wait_for(device)

    return repeats * 2 * rows * 1024 * 4096 * max(per_second(products, 0.2) for _ in range(5))


def median_of(rows: Sequence[dict[str, float]], key: str) -> float:
    """Return the median of a figure."""
    return statistics.median(row[key] for row in rows)
