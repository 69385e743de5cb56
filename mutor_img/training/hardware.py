"""What the device could do at best, for model FLOPs utilisation (MFU), and how memory is used best."""

from __future__ import annotations

import ctypes
import re
import time

import torch
from torch import Tensor

# Dense peaks in TFLOP/s from the vendors' data sheets: bf16, TF32, fp32. By words of the device's name; the first whose
# words are all in it counts.
GPU_PEAKS = (
    ("H200 NVL", 835, 417, 60), ("H200", 989, 494, 67), ("GH200", 989, 494, 67),
    ("H100 NVL", 835, 417, 60), ("H100 PCIe", 756, 378, 51), ("H100", 989, 494, 67),
    ("B200", 2250, 1125, 75), ("A100", 312, 156, 19.5), ("A800", 312, 156, 19.5),
    ("L40S", 362, 183, 91.6), ("L40", 181, 90.5, 90.5), ("A6000", 155, 77.4, 38.7), ("A40", 150, 74.8, 37.4),
    ("A10", 125, 62.5, 31.2), ("RTX 4090", 165, 82.6, 82.6), ("RTX 3090", 71, 35.6, 35.6),
    ("MI300X", 1307, 654, 163),
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


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a CPU tensor on the device, which copies it when it gets there: the CPU does not wait.

    From memory that is not pinned, the CPU would wait until the device has done all that it was told before.
    """
    if torch.device(device).type == "cuda":
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


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


def peak_flops(device: torch.device, precision: str, operation: str = "matmul") -> float | None:
    """Return the device's peak FLOP/s in a run's precision: a GPU's from the table, a CPU's measured.

    In fp32 a GPU's peak depends on whether torch lets it round to TF32. Unless a program says otherwise, torch does so
    for convolutions and not for products of matrices.

    A CPU is measured with square matrix products in the run's precision, of 256 rows and then of 1024, best of five
    each. A CPU that does not multiply bf16 itself would take 13 s for the large ones, so no product begins after 0.2 s.

    Args:
        device: where the run computes.
        precision: ``"bf16"`` or ``"fp32"``.
        operation: what most FLOPs are of, ``"matmul"`` or ``"conv"``.

    Returns:
        None where the GPU is not in the table.
    """
    if device.type == "cuda":
        setting = torch.backends.cudnn.conv if operation == "conv" else torch.backends.cuda.matmul
        allowed = "tf32" if precision == "fp32" and setting.fp32_precision == "tf32" else precision
        return gpu_peak(torch.cuda.get_device_name(device), allowed)
    best, begun = 0.0, time.perf_counter()
    for size in (256,) * 5 + (1024,) * 5:
        matrix = torch.ones(size, size, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        start = time.perf_counter()
        if best and start - begun > 0.2:
            break
        matrix @ matrix
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def gpu_peak(name: str, precision: str) -> float | None:
    """Return a GPU's peak FLOP/s in ``"bf16"``, ``"tf32"`` or ``"fp32"`` by its name; None: it is not in the table."""
    words = set(re.findall(r"\w+", name))
    for known, *peaks in GPU_PEAKS:
        if words.issuperset(known.split()):
            return peaks[("bf16", "tf32", "fp32").index(precision)] * 1e12
    return None
