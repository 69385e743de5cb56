"""Checks of a generator's training: what ``Trainer`` makes of a batch, in every way in which a run may be set up."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mutor_img.attention import SdpaAttention
from mutor_img.blocks import Block, ModelConfig, RotaryTable
from mutor_img.checkpoints.folder import find_checkpoint, open_group, read_tensors
from mutor_img.common.config import OptimConfig
from mutor_img.common.dropout import kept, mask_keys, row_keys
from mutor_img.gpu_report.place import CheckFailed, Place, expect, process_group, relative
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.examination import HEADS
from mutor_img.pretraining.parity import draw_at_scale_one, rms_difference
from mutor_img.pretraining.rehearsal import random_run, random_task
from mutor_img.pretraining.speed import measure_speed
from mutor_img.registers import RegisterLaw
from mutor_img.training import parallel
from mutor_img.training.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from mutor_img.training.runtime import Runtime
from mutor_img.training.trainer import Trainer

EMA = 0.9


@dataclass
class SmallConfig(GeneratorConfig):
    """A run whose model has two layers of two heads, whatever its preset."""

    head_dim: int = 64

    def model_config(self) -> ModelConfig:
        return replace(super().model_config(), layers=2, heads=HEADS, dim=HEADS * self.head_dim)


def small_run(folder: Path, law: RegisterLaw, precision: str, fast: bool, head_dim: int = 64,
              model: dict[str, Any] | None = None, train: dict[str, Any] | None = None) -> SmallConfig:
    """Return the config of a small run on random codes: compiled, with FlexAttention where that can train, or neither.

    Gradients are not clipped, so that they can be compared.
    """
    sizes = {"vocabulary": 64, "classes": 10, "dropout": 0.0, "attention": "auto" if fast else "sdpa"}
    return random_run(folder, law, schema=SmallConfig, head_dim=head_dim, model={**sizes, **(model or {})},
                      optim={"clip": 0.0}, train={"steps": 100, "global_batch": 4, "precision": precision,
                                                  "compile": fast, **(train or {})})


def trainer_of(place: Place, config: SmallConfig) -> Trainer:
    """Return the run's Trainer, with weights drawn so that comparisons see every part of the model."""
    task = random_task(config, place.runtime)
    draw_at_scale_one(task.model, seed=0)
    return Trainer(task, config, place.runtime)


def tensors_of(trainer: Trainer, step: int) -> dict[str, Tensor]:
    """Return the loss and every gradient of update ``step`` by name; nothing moves."""
    trainer.step = step
    logged = trainer.gradients()
    found = {"loss": logged["loss"]}
    for name, weight in trainer.model.named_parameters():
        found[f"gradient of {name}"] = whole(weight.grad).clone()
    trainer.model.zero_grad(set_to_none=True)
    return found


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor unsharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_training_step(place: Place, law: RegisterLaw, head_dim: int, precision: str, checkpointing: bool = False,
                        loss_chunk: int = 0) -> str:
    """The loss and every gradient of compiled updates against uncompiled fp32 SDPA; compiled once for all draws."""
    with tempfile.TemporaryDirectory() as folder:
        plain, exact = (trainer_of(place, small_run(Path(folder), law, rounded, False, head_dim))
                        for rounded in (precision, "fp32"))
        fast = trainer_of(place, small_run(Path(folder), law, precision, True, head_dim, {"loss_chunk": loss_chunk},
                                           {"activation_checkpointing": checkpointing}))
        differences = []
        for step in range(3):
            with torch.compiler.set_stance("fail_on_recompile") if step else nullcontext():
                found = tensors_of(fast, step)
            one, two = tensors_of(plain, step), tensors_of(exact, step)
            differences += [rms_difference(name, found[name], one[name], two[name], precision) for name in found]
    return expect(differences)


def check_dropout(place: Place, precision: str, rate: float = 0.1) -> str:
    """A compiled block drops what the same keys drop on a CPU, and scales the rest."""
    grid, device = (8, 8), place.device
    config = ModelConfig(1, HEADS, HEADS * 64, grid, dropout=rate)
    block = draw_at_scale_one(Block(config, drop_path=0.0), seed=0).to(device)
    run, attend, shares = place.compiled(block), SdpaAttention(config.length), []
    x = torch.randn(8, config.length, config.dim, generator=torch.Generator().manual_seed(0)).to(device)
    rope = RotaryTable(grid, 64).to(device)(torch.arange(config.length, device=device))[None]
    keys = row_keys(mask_keys(0, 0, torch.arange(8), places=2), config.length, config.dim)  # (2, 8, N, 2)

    def added(function: Callable, *keys: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return (function(x, rope, attend, *keys) - x).detach()  # with gradients on, as training compiles it

    for branch, silent, its in (("attention", block.feed_forward.w2, keys[0]),
                                ("feed-forward", block.attention.wo, keys[1])):
        weight, silent.weight.data = silent.weight.data, torch.zeros_like(silent.weight)
        plain, found = added(block), added(run, keys.to(device))  # (8, N, dim), what the branch adds
        silent.weight.data = weight
        expected = kept(its, config.dim, rate).to(device)
        wrong = ((found != 0) != expected).float().mean().item()
        if wrong:
            raise CheckFailed(f"{branch}: {wrong:.2%} of the mask is not what the same keys give on a CPU")
        scale = ((found * plain).sum() / plain[expected].square().sum()).item() * (1 - rate)
        if abs(scale - 1) > 0.01:
            raise CheckFailed(f"{branch}: what is kept is scaled by {scale / (1 - rate):.4f}, not {1 / (1 - rate):.4f}")
        shares.append(1 - expected.float().mean().item())
    return f"{shares[0]:.4f} and {shares[1]:.4f} of {x.numel()} dropped, {rate} asked for; the masks are a CPU's"


def check_dropout_gradient(place: Place, law: RegisterLaw, checkpointing: bool) -> str:
    """With dropout the loss falls along its gradient as fast as the gradient says: both have seen the same masks."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(place, small_run(Path(folder), law, "fp32", True, model={"dropout": 0.5},
                                              train={"activation_checkpointing": checkpointing}))
        found = tensors_of(trainer, 0)
        loss, again = found.pop("loss").item(), tensors_of(trainer, 0)["loss"].item()
        if abs(again - loss) > 1e-5 * loss:
            raise CheckFailed(f"the loss of one update is {loss:.6f} at first and then {again:.6f}: its masks are no "
                              "function of seed and step, and a resumed run would differ")
        square = sum(gradient.double().square().sum().item() for gradient in found.values())
        step, losses = 0.01 / square, []  # the loss should change by 0.01 to either side
        for sign in (1, -2):
            with torch.no_grad():
                for weight, gradient in zip(trainer.model.parameters(), found.values(), strict=True):
                    weight.add_(gradient, alpha=sign * step)
            losses.append(tensors_of(trainer, 0)["loss"].item())
    slope = (losses[0] - losses[1]) / 0.02
    if abs(slope - 1) > 0.05:
        raise CheckFailed(f"the loss changes by {slope:.3f} of what its gradient says: the masks of the backward pass "
                          "are not those of the forward pass")
    return f"the loss changes by {slope:.4f} of what its gradient says"


def check_ema(place: Place, law: RegisterLaw, updates: int = 4) -> str:
    """The averaged weights after some updates against the average taken by hand in float64."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(place, small_run(Path(folder), law, "bf16", True, train={"ema": EMA}))
        average = {name: weight.double() for name, weight in trainer.model.state_dict().items()}
        for number in range(updates):
            trainer.update()
            decay = min(EMA, (1 + number) / (10 + number))
            for name, weight in trainer.model.state_dict().items():
                average[name].lerp_(weight.double(), 1 - decay)
        moved = {name: relative(weight, average[name], weight) for name, weight in trainer.model.state_dict().items()}
        wrong = {name: relative(weight, average[name], weight)
                 for name, weight in trainer.ema.module.state_dict().items()}
    worst = max(wrong, key=wrong.get)
    if not wrong[worst] <= 1e-6 or not max(moved.values()) > 1e-4:
        raise CheckFailed(f"the average of {worst} is off by {wrong[worst]:.2g} of it; the weights themselves are "
                          f"{max(moved.values()):.2g} away from their average")
    return f"{len(wrong)} tensors after {updates} updates, the worst off by {wrong[worst]:.1e}"


def check_group(place: Place, law: RegisterLaw, wrapper: str, precision: str, checkpointing: bool = False) -> str:
    """An all-reduce, and an update under DDP or FSDP2 in a group of one process: its gradients, weights and files.

    Of sharded weights also a whole copy, and the checkpoint read back.
    """
    with tempfile.TemporaryDirectory() as folder, process_group(place.device) as backend:
        ones = torch.ones(1000, device=place.device)
        dist.all_reduce(ones)
        if not torch.equal(ones, torch.ones_like(ones)):
            raise CheckFailed("an all-reduce over one process changed its values")
        plain, exact = (trainer_of(place, small_run(Path(folder), law, rounded, False))
                        for rounded in (precision, "fp32"))
        fast = trainer_of(place, small_run(Path(folder), law, precision, True,
                                           train={"activation_checkpointing": checkpointing}))
        wrap(fast, wrapper)
        one, two, found = (tensors_of(trainer, 0) for trainer in (plain, exact, fast))
        detail = expect([rms_difference(name, found[name], one[name], two[name], precision) for name in found])
        before = {name: whole(weight).double() for name, weight in fast.model.named_parameters()}
        lr = fast.apply(fast.gradients())["lr"]
        fast.save()
        written = read_tensors(find_checkpoint(fast.run_dir), "model")
        for name, weight in fast.model.named_parameters():
            if not torch.equal(whole(weight).cpu(), written[name]):
                raise CheckFailed(f"the checkpoint's {name} is not the run's")
            expected = first_adamw_step(before[name], found[f"gradient of {name}"].double(), lr, fast.config.optim)
            share = relative(whole(weight), expected, expected - before[name])
            if not share <= 0.05:  # the signs of gradients near 0 are whole steps, and may differ
                raise CheckFailed(f"an update moves {name} elsewhere, by {share:.2f} of the way")
        if wrapper == "fsdp":
            expect_sharded_state(fast, parallel.blank_copy(exact.model))
    return f"{backend}: {detail}; the weights move as they should and are written as they are"


def expect_sharded_state(trainer: Trainer, blank: nn.Module) -> None:
    """Check a sharded model's whole copy, as pictures are drawn from, and what a resume reads from its checkpoint.

    Args:
        trainer: sharded; its newest checkpoint is of this moment.
        blank: a model without memory, for the copy.

    Raises:
        CheckFailed: a tensor of either is not the run's.
    """
    def state() -> dict[str, Tensor]:
        return {**trainer.model.state_dict(), **optimizer_tensors(trainer.model, trainer.optimizer)}

    expected = {name: whole(tensor).clone() for name, tensor in state().items()}
    copied = parallel.gather(trainer.model, blank, trainer.runtime, wanted=True).state_dict()
    for tensor in state().values():
        tensor.zero_()
    folder = find_checkpoint(trainer.run_dir)
    parallel.load_model(trainer.model, open_group(folder, "model"))
    load_optimizer_tensors(trainer.model, trainer.optimizer, open_group(folder, "optimizer"))
    for what, found in (("gathered", copied), ("read back", {name: whole(tensor) for name, tensor in state().items()})):
        for name, tensor in found.items():
            if not torch.equal(tensor, expected[name]):
                raise CheckFailed(f"{name}, {what}, is not the run's")


def first_adamw_step(weight: Tensor, gradient: Tensor, lr: float, config: OptimConfig) -> Tensor:
    """Return a weight after AdamW's first step: both moments are the gradient's own, so that its size has no say."""
    decay = config.weight_decay if weight.dim() >= 2 else 0.0
    return weight * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)


def wrap(trainer: Trainer, wrapper: str) -> None:
    """Put a Trainer of one process under ``"ddp"`` or ``"fsdp"``, as one of several processes is, in a group of one."""
    blocks, train = trainer.task.blocks(trainer.model), trainer.config.train
    if wrapper == "ddp":  # DDP treats a group of one no differently
        trainer.wrapped = parallel.distribute(trainer.model, blocks, train, Runtime(trainer.runtime.device, 0, 2))
        return
    parallel.shard(trainer.model, blocks, train, trainer.runtime)
    trainer.optimizer, trainer.sharded = build_optimizer(trainer.model, trainer.config.optim), True


def measure_update(place: Place, law: RegisterLaw, checkpointing: bool = False, preset: str = "B", batch: int = 32,
                   rounds: int = 10, vocabulary: int = 16384) -> str:
    """Time of a whole compiled update in bf16: tokens per second, idle share, peak memory beside the planned.

    On a full GPU with half as many sequences, and so on.
    """
    found = measure_speed(place.runtime, law, preset=preset, batch=batch, rounds=rounds, vocabulary=vocabulary,
                          checkpointing=checkpointing)
    if not abs(found.first_loss - math.log(vocabulary)) < 0.01:  # the head is 0
        raise CheckFailed(f"the first loss is {found.first_loss:.4f}, not ln {vocabulary}")
    parts = [f"{found.sequences} sequences: {1000 * found.seconds:.1f} ms per update",
             f"{found.sequences * law.length / found.seconds:,.0f} tokens/s"]
    if found.mfu is not None:
        parts.append(f"MFU {found.mfu:.1%}")
    if found.idle is not None:
        parts.append(f"idle {found.idle:.1%}, {found.kernels:.0f} kernels")
    if found.held is not None:
        parts.append(f"peak memory {found.held:.1f} GiB, planned {found.planned:.1f}")
    return ", ".join(parts)
