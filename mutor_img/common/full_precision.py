"""Full single precision for whatever runs inside, whatever the caller has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# By backend and operation, from the top down: a setting that says nothing of its own follows those above it.
_SETTINGS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("cuda", "matmul"), ("cuda", "conv"),
             ("cuda", "rnn"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn"))
# torch.backends reaches these too, but neither all of them nor each for writing.
_read, _write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch autocast, TF32 and reduced-precision float32 kernels off, and gradients too; restore them after.

    TF32 convolutions move Inception features by 6e-4, a bf16 autocast that leaks in by 1.5e-2.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_full_products())
        yield


@contextmanager
def _full_products() -> Iterator[None]:
    """Have products and convolutions of float32 numbers computed in float32.

    Torch has settings of two kinds: the ``fp32_precision`` of backends, which kernels obey, and the older
    ``set_float32_matmul_precision`` and ``allow_tf32``. Where the two disagree, reading an older one raises, as
    compilers and libraries do. So both are switched, and both come back.
    """
    seen = {setting: _read(*setting) for setting in _SETTINGS}
    cudnn, matmul = _cudnn_allows_tf32(), None
    own: dict[tuple[str, str], str] = {}
    try:
        for setting in _SETTINGS:
            own[setting] = _own(*setting)
            if setting[1] == "all" or own[setting] not in ("none", "ieee"):
                _write(*setting, "ieee")
        matmul = torch.get_float32_matmul_precision()
        _set_older(None if cudnn is None else False, "highest")
        yield
    finally:
        for setting in _SETTINGS[:3]:
            _write(*setting, "ieee")
        _set_older(cudnn, matmul)
        for setting, value in reversed(own.items()):
            if _own(*setting) != value:
                _write(*setting, value)
        # Torch never says that convolutions on GPUs stand at their unset default, nor can that be written: what it
        # amounts to can.
        for setting, value in seen.items():
            if _read(*setting) != value:
                _write(*setting, value)


def _own(backend: str, operation: str) -> str:
    """Return what a setting says itself, those above it being at "ieee"; "none" where it follows them."""
    value = _read(backend, operation)
    if value != "ieee" or backend == "generic":
        return value
    above = ("generic" if operation == "all" else backend, "all")
    _write(*above, "tf32")
    follows = _read(backend, operation) == "tf32"
    _write(*above, "ieee")
    return "none" if follows else "ieee"


def _cudnn_allows_tf32() -> bool | None:
    """Return the older setting of convolutions; None where it disagrees with the newer ones, and is left alone."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _set_older(cudnn: bool | None, matmul: str | None) -> None:
    """Set the older settings, and with them newer ones; None leaves one as it is."""
    if cudnn is not None:
        torch.backends.cudnn.allow_tf32 = cudnn
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
