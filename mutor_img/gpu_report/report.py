"""The report: what machine, what was checked, what came out, in Markdown."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from tqdm import tqdm

from mutor_img.gpu_report.checks import LAWS, PLAIN, CheckFailed, Place, measure_step

PACKAGES = ("mutor_img", "torch", "triton", "torchvision", "timm", "accelerate", "safetensors", "numpy")


@dataclass(frozen=True)
class Outcome:
    """One check's result: its detail where it passed, what was wrong where it failed."""

    name: str
    passed: bool
    detail: str
    seconds: float


def run_checks(checks: dict[str, Callable[[Place], str]], place: Place) -> list[Outcome]:
    """Run checks one after the other; whatever one raises is its outcome, and the next one runs."""
    outcomes = []
    with tqdm(checks.items(), unit="check", dynamic_ncols=True) as bar:
        for name, check in bar:
            bar.set_description(name)
            begun = time.perf_counter()
            try:
                passed, detail = True, check(place)
            except CheckFailed as failure:
                passed, detail = False, str(failure)
            except Exception as error:  # a compiler's or a driver's: the report must show it and go on
                passed, detail = False, f"{type(error).__name__}: {error}"
            outcomes.append(Outcome(name, passed, detail.strip(), time.perf_counter() - begun))
            if not passed:
                bar.write(f"FAILED {name}: {detail.strip().splitlines()[0]}")
    return outcomes


def timings(batch: int) -> dict[str, Callable[[Place], str]]:
    """Return the measured updates of B: next-token, 256 and 80 registers; on a full GPU, with fewer sequences."""
    laws = {"next-token": PLAIN, "256 registers": LAWS["2d dense"], "80 registers": LAWS["2d sparse"]}
    return {f"update of B, bf16, {name}": partial(_shrinking, law=law, batch=batch) for name, law in laws.items()}


def _shrinking(place: Place, law, batch: int, **sizes) -> str:
    while True:
        try:
            return measure_step(place, law, batch=batch, **sizes)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2  # outside of the handler, whose traceback holds on to the tensors
        torch.cuda.empty_cache()


def environment(device: torch.device) -> dict[str, str]:
    """Return what a bug report must say of the machine."""
    facts = {"system": f"{platform.platform()}, Python {platform.python_version()}"}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    facts["CUDA of torch"] = str(torch.version.cuda or torch.version.hip)
    if device.type != "cuda":
        return {**facts, "device": "CPU"}
    properties = torch.cuda.get_device_properties(device)
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
    return {**facts, "device": f"{torch.cuda.device_count()} x {properties.name}, of which one is checked",
            "capability": f"{properties.major}.{properties.minor}", "driver": driver_version(),
            "memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "multiprocessors": str(properties.multi_processor_count),
            "cuDNN": str(torch.backends.cudnn.version()), "NCCL": ".".join(map(str, nccl)) or "none"}


def driver_version() -> str:
    """Return the driver's version as nvidia-smi says it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return (answer.stdout.strip().splitlines() or ["unknown"])[0]


def to_markdown(facts: dict[str, str], outcomes: list[Outcome]) -> str:
    """Return the report: verdict, machine, failures in full, then a line a check."""
    failed = [outcome for outcome in outcomes if not outcome.passed]
    verdict = f"{len(failed)} of {len(outcomes)} checks FAILED" if failed else f"all {len(outcomes)} checks passed"
    lines = [f"## GPU report: {verdict}", "", *(f"- {name}: {value}" for name, value in facts.items())]
    for outcome in failed:
        lines += ["", f"### FAILED: {outcome.name}", "```", outcome.detail[-4000:], "```"]
    lines += ["", "| check | result | seconds | detail |", "|---|---|---|---|"]
    for outcome in outcomes:
        detail = (outcome.detail.splitlines() or [""])[0].replace("|", "\\|")
        lines.append(f"| {outcome.name} | {'pass' if outcome.passed else 'FAIL'} | {outcome.seconds:.1f} | {detail} |")
    return "\n".join(lines) + "\n"
