"""The process in which checks run, one after the other as it is asked to; report.py starts another after a failure.

    python -m mutor_img.gpu_report.worker
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from mutor_img.common.child import serve
from mutor_img.gpu_report.checks import Check, all_checks
from mutor_img.gpu_report.place import CheckFailed, Place
from mutor_img.pretraining.speed import forget_all

PACKAGES = ("mutor_img", "torch", "triton", "torchvision", "timm", "accelerate", "safetensors", "numpy")
ENVIRONMENT = "environment"  # the question for the machine, in place of a check's name


def answering(table: Callable[[int], Mapping[str, Check]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what answers a question: with a check's result, or with what there is to say of the machine.

    A question holds ``check``, a name or :data:`ENVIRONMENT`, ``device``, ``backend`` and ``batch``.

    Args:
        table: returns all checks by name for ``batch`` sequences in a measured update.
    """
    def answer(question: dict[str, Any]) -> dict[str, Any]:
        device = torch.device(question["device"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if question["check"] == ENVIRONMENT:
            return environment(device)
        return run_check(table(question["batch"])[question["check"]], Place(device, question["backend"]))

    return answer


def run_check(check: Check, place: Place) -> dict[str, Any]:
    """Return whether a check passed, and its detail or what it raised."""
    try:
        return {"passed": True, "detail": check(place).strip()}
    except CheckFailed as failure:
        return {"passed": False, "detail": str(failure).strip()}
    except Exception as error:  # a compiler's or a driver's: the report must show it
        text = f"{type(error).__name__}: {error}".strip()
        return {"passed": False, "detail": f"{text}\n\n{''.join(traceback.format_exception(error)[-6:])}"}
    finally:
        with suppress(Exception):  # a device that has failed fails here again
            forget_all()


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


if __name__ == "__main__":
    serve(answering(lambda batch: all_checks(batch=batch)))
