"""A GPU that is not there: CUDA tensors without numbers, beside CPU tensors with theirs.

Under :class:`FakeCuda` what is on "cuda" is a FakeTensor, which has a shape, a dtype and a device. So the code that
runs on a GPU runs on any machine, and what would fail there, or make the CPU wait, is refused where it happens.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mutor_img.training.runtime import Runtime
from mutor_img.training.saved_bytes import autocast_as_trained

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = tuple(str(ROOT / name) + "/" for name in ("mutor_img", "tokenizer"))
CUDA, META = torch.device("cuda", 0), torch.device("meta")
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
NUMBERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # hangs on what the tensors hold
ALLOCATING = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
COPIES = (aten.copy_, aten._foreach_copy_)  # from the CPU to the GPU they may


class MixedDevices(RuntimeError):
    """One operation took tensors of the CPU and of the GPU."""


class HostRead(RuntimeError):
    """The CPU asked for numbers that are on the GPU: ``.item()``, ``bool()``, ``.cpu()``, a mask as an index."""


class CpuGenerator(torch.Generator):
    """A generator of random numbers, on the CPU wherever it is asked for."""

    def __new__(cls, device: object = "cpu"):
        return super().__new__(cls, "cpu")


class FakeCuda(TorchDispatchMode):
    """A context in which "cuda" exists.

    FakeTensorMode alone lets an index of another device pass, and makes CPU tensors fake too, so that not even a sample
    number could be read.

    Args:
        reads: functions of the project, dotted, that may read from the GPU. They get numbers that are made up: 1 for a
            single one, True, a ramp. One that reads nothing is an error at the end.

    Attributes:
        kernels: operations that the GPU was given, copies to it among them.
        waits: reads for which the CPU would have waited: all but copies that are not blocking.
    """

    def __init__(self, reads: Collection[str] = ()):
        super().__init__()
        self.reads, self.seen, self._stack = set(reads), set(), ExitStack()
        self.kernels, self.waits = 0, 0

    def __enter__(self) -> FakeCuda:
        def autocast(runtime: Runtime, precision: str):  # torch.autocast refuses CUDA where there is none
            return autocast_as_trained(runtime.device.type, precision)

        self._stack.enter_context(mock.patch.object(Runtime, "start", lambda *_, **__: Runtime(torch.device("cuda"))))
        self._stack.enter_context(mock.patch.object(Runtime, "autocast", autocast))
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))  # what is compiled runs as it is written
        self._stack.enter_context(mock.patch("torch.cuda.get_device_name", lambda device: "H100"))
        self._stack.enter_context(mock.patch("torch.Generator", CpuGenerator))
        self._stack.enter_context(mock.patch("torch.cuda.Event", mock.Mock))
        self._stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda x: x))  # it asks for a driver
        self._stack.enter_context(mock.patch.object(FakeTensor, "is_cuda", property(lambda x: x.device.type == "cuda"),
                                                    create=True))
        # FakeTensorMode remembers each tensor by a weak reference, for which Module.to would refuse to swap it.
        self._stack.enter_context(mock.patch("weakref.getweakrefs", lambda x: []))
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        return super().__enter__()

    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        self._stack.close()
        assert kind is not None or self.seen == self.reads, f"{self.reads - self.seen} never read from the GPU"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return META  # C++ alone asks here. Told "cuda", autograd's backward pass would want a driver's streams
        kwargs, op = dict(kwargs or {}), func.overloadpacket
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        if kwargs.get("device") == META and (any(x.device != META for x in tensors) or not within_device_context()):
            kwargs["device"] = CUDA  # C++ again, with the device that it was told
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if not fakes and (target is None or target.type != "cuda"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        self.kernels += not (func.is_view or op in ALLOCATING)
        others = [x for x in tensors if not isinstance(x, FakeTensor)]
        to_cpu = fakes and (target == torch.device("cpu") or (op in COPIES and others and args[0] is others[0]))
        masked = fakes and op in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
        if to_cpu or masked or (op not in INDEXING and NUMBERS & set(func.tags)):
            return self._read(func, fakes[0], args, kwargs)
        if op is aten._to_copy and others:  # to the GPU, where numbers are gone
            return torch.empty(others[0].shape, dtype=kwargs.get("dtype") or others[0].dtype, device=CUDA)
        if op is aten.copy_ and others and torch.broadcast_shapes(args[0].shape, others[0].shape) == args[0].shape:
            return args[0]
        if fakes and op not in COPIES and any(x.dim() or op in INDEXING for x in others):
            raise MixedDevices(f"{func} in {project_place()}: tensors of CPU and GPU")
        return func(*args, **kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # no wrapper around each call: the same, and faster

    def _read(self, func, source: FakeTensor, args, kwargs):
        place, op = project_place(), func.overloadpacket
        if place not in self.reads:
            raise HostRead(f"{func} in {place}")
        self.seen.add(place)
        self.waits += not kwargs.get("non_blocking")
        if op is aten._local_scalar_dense:
            return True if source.dtype == torch.bool else 1.0 if source.is_floating_point() else 1
        if op in COPIES or op in (aten.index_put_, aten._index_put_impl_):
            return args[0]
        if op is aten._to_copy:
            with unset_fake_temporarily():
                ramp = torch.arange(source.numel()) % 7 / 7
                return ramp.view(source.shape).to(kwargs.get("dtype") or source.dtype)
        if op is aten.nonzero:
            return torch.zeros(1, source.dim(), dtype=torch.int64, device=CUDA)
        if op is aten.index:  # of one mask, at the front
            return torch.zeros(1, *args[0].shape[args[1][0].dim():], dtype=args[0].dtype, device=CUDA)
        raise NotImplementedError(f"numbers for {func} in {place}")


def within_device_context() -> bool:
    """Tell whether a ``with torch.device(...)`` chose the device of the tensor that is being made."""
    frame = sys._getframe()
    while frame and frame.f_code.co_filename != _device.__file__:
        frame = frame.f_back
    return frame is not None


def project_place() -> str:
    """Return the innermost function of the project that is running, dotted."""
    frame = sys._getframe()
    while frame and not frame.f_code.co_filename.startswith(PACKAGES):
        frame = frame.f_back
    if frame is None:
        return "a test"
    return f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname.split('.<locals>')[0]}"
