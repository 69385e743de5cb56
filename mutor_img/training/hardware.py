"""What the device could do at best, for model FLOPs utilisation (MFU)."""

from __future__ import annotations

import ctypes
import time

import torch

# Dense bf16 peaks in FLOP/s from the vendors' data sheets, by a part of the device's name; first match counts.
GPU_PEAKS = (
    ("H200", 989e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("GH200", 989e12), ("B200", 2250e12),
    ("A100", 312e12), ("A800", 312e12), ("L40S", 362e12), ("L40", 181e12), ("A6000", 155e12), ("A40", 150e12),
    ("A10", 125e12), ("RTX 4090", 165e12), ("RTX 3090", 71e12), ("MI300X", 1307e12),
)


def keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed, for the next step, in place of giving them back to the system.

    A step's logits are hundreds of megabytes: without this a step on a CPU spends up to a third of its time on page
    faults. Does nothing where the C library has no ``mallopt``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and stay there


def computes_in_bf16(device: torch.device) -> bool:
    """Tell whether the device multiplies bf16 numbers itself; on a CPU that does not, bf16 is many times slower."""
    if device.type != "cpu":
        return True
    # As torch names the instructions of x86 and ARM: avx512_bf16, amx_bf16, sve_bf16, ...
    return any(there is True for name, there in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def precision_on(device: torch.device, precision: str) -> str:
    """Return "bf16" or "fp32": what ``train.precision`` means on a device."""
    if precision != "auto":
        return precision
    return "bf16" if computes_in_bf16(device) else "fp32"


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the device's peak FLOP/s: a GPU's from the table (None where it is unknown), a CPU's measured.

    A CPU is measured with square matrix products of 1024 in the run's precision, best of five, in about 0.2 s.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in GPU_PEAKS if part in name), None)
    matrix = torch.ones(1024, 1024, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
