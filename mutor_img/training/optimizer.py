"""AdamW with weight decay on matrices only, the learning rate as a function of the step, and tensor-only state."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mutor_img.checkpoints.tensor_files import TensorGroup
from mutor_img.common.config import OptimConfig
from mutor_img.common.errors import UserError
from mutor_img.training.parallel import copy_rows


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return fused AdamW: decay on tensors of two or more dimensions, none on norms and biases (LlamaGen's rule)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), fused=True)


def clip_gradients(weights: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients of weights so that their norm, all taken together, is at most ``most``; 0: they stay.

    A GPU multiplies them in any case, by 1 where they are short enough: nobody may wait to know it. A CPU knows the
    norm at once, and then leaves them alone: the same bits, and a pass over all of them less.

    Returns:
        () fp32, the norm before; the same on all ranks.
    """
    weights = [weight for weight in weights if weight.grad is not None]
    norm = nn.utils.get_total_norm([weight.grad for weight in weights])
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    factor = most / (whole + 1e-6)  # as clip_grads_with_norm_ has it
    if most and not (whole.device.type == "cpu" and factor >= 1):
        nn.utils.clip_grads_with_norm_(weights, most, norm)
    return whole


def take_step(optimizer: torch.optim.AdamW, lr: float, skipped: Tensor) -> None:
    """Move weights along their gradients, and drop these; where ``skipped``, neither weights nor moments move.

    Args:
        optimizer: fused.
        lr: the learning rate.
        skipped: () bool, on the device. Nobody waits to know it.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = skipped.float()  # where torch.amp.GradScaler tells fused optimisers of an overflow
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Keep every weight as it is whose name matches one of the patterns: it gets no gradient and no weight decay.

    Args:
        model: the model, before it is wrapped.
        patterns: names, with ``*`` for anything, dots included, as the shell matches file names.

    Raises:
        UserError: a pattern that matches no weight, or nothing left to train.
    """
    weights = dict(model.named_parameters())
    for pattern in patterns:
        named = [weight for name, weight in weights.items() if fnmatchcase(name, pattern)]
        if not named:
            part = pattern.strip("*.")  # a * may have been forgotten
            [nearest] = [name for name in weights if part in name][:1] or get_close_matches(pattern, weights, 1, 0.0)
            raise UserError(f"freeze: {pattern!r} matches no weight of the model; the nearest name is {nearest!r}")
        for weight in named:
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in weights.values()):
        raise UserError(f"freeze: {', '.join(patterns)} leaves no weight to train; leave a pattern out")


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of update ``step`` (from 0) of ``steps``.

    A linear warm-up reaches ``lr`` at step ``warmup_steps``; then constant, a half cosine to ``final_lr``, or (wsd)
    constant until the last ``decay_steps``, which fall linearly to ``final_lr``. At each of ``restarts`` all of this
    starts anew, as if the run began there and ended at the next one. Where ``lr`` is below ``final_lr``, it stays.
    """
    bounds = [0, *(restart for restart in config.restarts if restart < steps)]
    begin = bounds[bisect_right(bounds, step) - 1]
    end = next((bound for bound in bounds if bound > begin), steps)
    step, steps = step - begin, end - begin
    last = min(config.final_lr, config.lr)
    decay_steps = config.decay_steps or round(config.decay_share * steps)
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return last + (config.lr - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule == "wsd" and decay_steps and step >= steps - decay_steps:
        left = max(0, steps - step) / decay_steps
        return last + (config.lr - last) * left
    return config.lr


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state by parameter name: ``exp_avg/<name>``, ``exp_avg_sq/<name>``, ``step/<name>``."""
    return {f"{key}/{name}": value for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()}


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, group: TensorGroup) -> None:
    """Restore :func:`optimizer_tensors`' output; of sharded state the rows that this process holds.

    Raises:
        UserError: a tensor names no parameter of this model or has another shape.
    """
    parameters = dict(model.named_parameters())
    for full_name, shape in group.shapes.items():
        key, _, name = full_name.partition("/")
        parameter = parameters.get(name)
        if parameter is None or (key != "step" and shape != tuple(parameter.shape)):
            raise UserError(f"{group.origin}: {full_name} fits no parameter of this model; use another checkpoint")
        if key == "step":
            optimizer.state[parameter][key] = group.read(full_name).to(parameter.device)
            continue
        # Fused AdamW walks over memory, so that moments must be laid out as their weights are.
        moment = torch.empty_like(parameter).detach()
        copy_rows(moment, group, full_name)
        optimizer.state[parameter][key] = moment
