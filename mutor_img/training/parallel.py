"""Activation checkpointing, compiling and distributing a model, in this order and from outside.

The model's file knows of none of it, and the names of its weights stay as they are: checkpointing and compiling replace
a block's ``forward``, FSDP2 its parameters by sharded ones of the same names.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mutor_img.checkpoints.folder import check_shapes, fill_blank
from mutor_img.checkpoints.tensor_files import Slice, TensorGroup
from mutor_img.common.config import TrainConfig
from mutor_img.training.compiling import compile_blocks, replace_forward
from mutor_img.training.runtime import Runtime

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


def is_sharded(train: TrainConfig, runtime: Runtime) -> bool:
    """Tell whether a run's state is spread over its processes; one process has nothing to share, and trains plainly."""
    return train.parallel == "fsdp" and runtime.world > 1


def prepare_blocks(blocks: list[nn.Module], train: TrainConfig) -> None:
    """Checkpoint the activations of each block, compile each block, or both, as the config says.

    ``optimize_ddp`` is off: it would cut each block's graph where DDP's buckets end (and give up on graphs with
    FlexAttention or a checkpoint in them), so that reduction overlaps with the backward pass. Here it overlaps without:
    each block is a graph of its own, whose gradients are on their way while the block before it goes backward.
    """
    if train.activation_checkpointing:
        replace_forward(blocks, _checkpointed)
    if train.compile:
        torch._dynamo.config.optimize_ddp = False
        compile_blocks(blocks)


def _checkpointed(function: Callable) -> Callable:
    """Return a function of a block and its inputs that keeps no activations."""
    def forward(block: nn.Module, *inputs):
        return checkpoint(partial(function, block), *inputs, use_reentrant=False)

    return forward


def distribute(model: nn.Module, blocks: list[nn.Module], train: TrainConfig, runtime: Runtime) -> nn.Module:
    """Return what to call in place of ``model``: itself, itself with sharded parameters (FSDP2), or a DDP wrapper.

    Args:
        model: on the device, or with FSDP2 anywhere: then only one block at a time is whole on the device.
        blocks: its parts that FSDP2 gathers, and frees again, one by one.
        train: says how.
        runtime: this process.
    """
    if is_sharded(train, runtime):
        shard(model, blocks, train, runtime)
    elif runtime.world > 1:
        # No device_ids: they only move inputs, which are on the device, and a call without any would fail.
        with warnings.catch_warnings():  # torch 2.14 deprecates broadcast_buffers and has nothing yet in its place
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        _settle_buckets(wrapped)
        return wrapped
    return model


def _settle_buckets(wrapped: DistributedDataParallel) -> None:
    """Have DDP lay out its buckets of gradients for good, by an empty backward pass before the first update.

    It does so once in a process, in the order in which gradients first arrived. A sum over three or more processes
    rounds by a gradient's place, so that without this a resumed run would leave the bytes of an uninterrupted one.
    """
    model = wrapped.module
    model.forward = lambda: 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
    wrapped().backward()
    del model.forward
    model.zero_grad(set_to_none=True)


def shard(model: nn.Module, blocks: list[nn.Module], train: TrainConfig, runtime: Runtime) -> None:
    """Shard parameters over all processes, in place: each block on its own, the rest together.

    Weights, their gradients and all that is made from them stay fp32. In a bf16 run the blocks' weights travel, and
    act, in bf16, and gradients are summed in fp32; embeddings and head travel in fp32, so that the residual stream is
    fp32 under autocast as it is under DDP.
    """
    mesh = init_device_mesh(runtime.device.type, (runtime.world,))
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=low if train.precision == "bf16" else plain)
    fully_shard(model, mesh=mesh, mp_policy=plain)
    model.to(runtime.device)


def reduce_gradients(wrapped: nn.Module, now: bool) -> None:
    """Let the next backward pass reduce gradients over processes, or only collect them: once per update is enough."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(now)
        wrapped.set_is_last_backward(now)
    elif isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = now


def local_rows(tensor: Tensor) -> Slice:
    """Return the rows of a tensor sharded by FSDP2 that this process holds: torch.chunk's share, perhaps none."""
    local, total = tensor.to_local(), tensor.shape[0]
    each = -(-total // tensor.device_mesh.size())
    return Slice(local, min(total, each * tensor.device_mesh.get_local_rank()), total)


def as_slices(tensors: dict[str, Tensor], runtime: Runtime) -> dict[str, Tensor | Slice]:
    """Return named tensors as the rows of each that this process saves; scalars, and all of a single process, whole.

    Of what is sharded these are the rows that it holds. What every process holds is shared out in the same way.
    """
    def part(tensor: Tensor) -> Tensor | Slice:
        if isinstance(tensor, DTensor):
            return local_rows(tensor)
        if runtime.world == 1 or not tensor.dim():
            return tensor
        each = -(-len(tensor) // runtime.world)
        start = min(len(tensor), each * runtime.rank)
        return Slice(tensor[start:start + each], start, len(tensor))

    return {name: part(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def copy_rows(target: Tensor, group: TensorGroup, name: str) -> None:
    """Fill a tensor, or of a sharded one the rows that this process holds, from a checkpoint's files."""
    if not isinstance(target, DTensor):
        target.copy_(group.read(name))
        return
    rows = local_rows(target)
    rows.tensor.copy_(group.read(name, rows.start, rows.start + len(rows.tensor)))


def held(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return named tensors as this process holds them: of a sharded one its rows, in the same memory."""
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def not_finite(tensors: dict[str, Tensor], runtime: Runtime) -> str | None:
    """Return the name of the first tensor with a number that is not finite, or None; one read from the device.

    Of a sharded tensor those numbers count that this process holds.
    """
    ends = {name: torch.stack(tensor.detach().aminmax()).double().to(runtime.device)  # both are NaN where one number is
            for name, tensor in held(tensors).items() if tensor.numel() and tensor.is_floating_point()}
    sound = torch.stack(list(ends.values())).isfinite().all(dim=1).tolist() if ends else []
    return next((name for name, good in zip(ends, sound) if not good), None)


def other_copy(tensors: dict[str, Tensor], runtime: Runtime) -> str | None:
    """Return the name of the first tensor whose bits are not those of rank 0's, or None; all processes call this.

    Of each tensor one number travels, the sum of its bits read as whole numbers: any one flipped bit changes it. What
    is sharded stands nowhere twice and is passed over.
    """
    copies = {name: tensor.detach() for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    if runtime.world == 1 or not copies:
        return None
    sums = torch.stack([tensor.view(_WHOLE[tensor.element_size()]).sum(dtype=torch.int64).to(runtime.device)
                        for tensor in copies.values()])  # (tensors,)
    first = sums.clone()
    dist.broadcast(first, 0)
    return next((name for name, same in zip(copies, (sums == first).tolist()) if not same), None)


def load_model(model: nn.Module, group: TensorGroup) -> None:
    """Fill a model, sharded or not, from a checkpoint's files.

    Raises:
        UserError: a name or a shape differs, or the files lack rows.
    """
    check_shapes(model, group.shapes, group.origin)
    for name, target in model.state_dict().items():
        copy_rows(target, group, name)


def blank_copy(model: nn.Module) -> nn.Module:
    """Return a copy without memory behind its tensors, for :func:`gather` to fill."""
    blank: dict[int, Tensor] = {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    blank |= {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, blank)


@torch.no_grad()
def gather(model: nn.Module, blank: nn.Module, runtime: Runtime, wanted: bool) -> nn.Module | None:
    """Return a whole copy of a sharded model on the processes that want it; all have to call this.

    Args:
        model: sharded by :func:`shard`.
        blank: :func:`blank_copy` of it, made before. What it holds beside weights it makes anew itself.
        runtime: this process.
        wanted: whether this process keeps the copy.
    """
    weights = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value.clone()
        if wanted:
            weights[name] = whole
    return fill_blank(copy.deepcopy(blank), weights, runtime.device) if wanted else None
