"""Compiled FlexAttention against exact attention on a run's own mask and sizes: what the preflight has a child do.

    python -m mutor_img.pretraining.examination        (started by preflight.py, which asks it one question)

A small batch and few heads, which decide nothing about the kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mutor_img.attention import FlexAttention, SdpaAttention
from mutor_img.common.child import serve
from mutor_img.pretraining.parity import Difference, compare_attention, draw_at_scale_one, rms_difference
from mutor_img.registers import RegisterLaw, register_ids
from mutor_img.training.compiling import compile_whole
from mutor_img.transformer import Block, ModelConfig, RotaryTable

BATCH, HEADS = 2, 2


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Attributes:
        law: the run's registers.
        head_dim: the model's.
        precision: ``"bf16"`` or ``"fp32"``.
        seed: the run's.
        device: where, as ``"cuda:3"``.
        gradients: False compares outputs alone, as on CPUs, where FlexAttention has no backward.
        matmul: torch's setting of fp32 products on GPUs, ``"ieee"``, ``"tf32"`` or ``"none"`` (not set).
    """

    law: RegisterLaw
    head_dim: int
    precision: str
    seed: int
    device: str
    gradients: bool = True
    matmul: str = "none"

    def __str__(self) -> str:
        return (f"{self.law.registers} registers ({self.law.kind}) on {self.law.grid[0]} x {self.law.grid[1]} codes, "
                f"head dimension {self.head_dim}, {self.precision}")

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Subject:
        """Build from :meth:`to_json`'s output after a trip through JSON."""
        law = {name: tuple(value) if isinstance(value, list) else value for name, value in values["law"].items()}
        return cls(**{**values, "law": RegisterLaw(**law)})


@dataclass(frozen=True)
class Findings:
    """What an examination found.

    Attributes:
        differences: by the name of the draw of registers, in order.
        error: what a compilation, a run or the whole process met, one line; None where nothing did.
        log: the end of what a process that did not answer had printed.
    """

    differences: list[tuple[str, Difference]]
    error: str | None = None
    log: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, NaNs among them."""
        return {"error": self.error, "log": self.log,
                "differences": [[draw, asdict(difference)] for draw, difference in self.differences]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Findings:
        """Build from :meth:`to_json`'s output; raises KeyError or TypeError where it is something else."""
        differences = [(draw, Difference(**difference)) for draw, difference in values["differences"]]
        return cls(differences, values["error"], values["log"])


def examine(subject: Subject, backend: type = FlexAttention, compiled: Callable = compile_whole) -> Findings:
    """Compare ``backend``, compiled by ``compiled``, with exact attention, in this process."""
    device, found = torch.device(subject.device), []
    try:
        # A caller's autocast would round what the comparison wants exact.
        with (torch.random.fork_rng([device] if device.type == "cuda" else []),
              torch.autocast(device.type, enabled=False)):
            for named in _differences(subject, device, backend, compiled):
                found.append(named)
    except Exception as error:  # whatever a compiler or a driver raises means the same: do not use it
        return Findings(found, f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")
    return Findings(found)


def _differences(subject: Subject, device: torch.device, backend: type,
                 compiled: Callable) -> Iterator[tuple[str, Difference]]:
    """Yield every difference with the name of its draw: attention alone first, then inside a compiled block."""
    law, seed, head_dim = subject.law, subject.seed, subject.head_dim
    dtype = torch.bfloat16 if subject.precision == "bf16" else torch.float32
    draws = {name: anchors.to(device) for name, anchors in draws_of(law, seed).items()}
    flex = backend(law.length, next(iter(draws.values())), fixed_anchors=law.count is None)
    attend = compiled(lambda q, k, v: flex(q, k, v))
    for number, (name, anchors) in enumerate(draws.items()):
        flex.update(anchors)
        for difference in compare_attention(attend, anchors, law.length, heads=HEADS, head_dim=head_dim, dtype=dtype,
                                            seed=seed + number, gradients=subject.gradients):
            yield name, difference
    torch.manual_seed(seed)
    block = Block(ModelConfig(1, HEADS, HEADS * head_dim, dropout=0.0), drop_path=0.0)
    block = draw_at_scale_one(block, seed).to(device)
    run = compiled(block)
    for name, anchors in draws.items():
        flex.update(anchors)
        for difference in compare_block(block, run, flex, anchors, law.grid, subject.precision, subject.gradients):
            yield f"{name}, in a compiled block", difference


def draws_of(law: RegisterLaw, seed: int) -> dict[str, Tensor]:
    """Return anchors (2, R) int64 by name: two updates of the run, and for drawn anchors the two extremes."""
    samples = torch.arange(BATCH)
    draws = {f"update {step}": law.draw(seed, step, samples)[0] for step in range(2)}
    if law.count is not None:
        first = torch.arange(law.count).expand(BATCH, -1)
        draws |= {"earliest anchors": first, "latest anchors": first + law.length - law.count}
    return draws


def compare_block(block: Block, run: Callable, flex: Callable, anchors: Tensor, grid: tuple[int, int], precision: str,
                  gradients: bool) -> list[Difference]:
    """Compare a compiled block with FlexAttention against the block with SDPA in float64, in root mean square.

    It shows what attention alone cannot: whether q, k and v arrive as the block lays them out. What is allowed is a
    multiple of what the uncompiled block with SDPA is off by in the run's own precision.

    Args:
        block: the block, float32 weights.
        run: the block, compiled.
        flex: the backend, at ``anchors`` (B, R).
        precision: ``"bf16"``: autocast, ``"fp32"``.
    """
    length, dim = grid[0] * grid[1], block.attention_norm.weight.shape[0]
    sdpa = SdpaAttention(length, anchors)
    ids = torch.cat([torch.arange(length, device=anchors.device).expand(len(anchors), -1),
                     register_ids(anchors, torch.ones_like(anchors), length)], dim=1)  # (B, N + R)
    rope = RotaryTable(grid, dim // block.attention.heads).to(anchors.device)(ids)
    x, upstream = torch.randn(2, *ids.shape, dim, device=anchors.device).unbind()
    weights = [block.attention.wqkv.weight, block.attention.wo.weight]
    names = ["output", "gradient of the input", "gradient of wqkv", "gradient of wo"][: 4 if gradients else 1]

    def tensors(function: Callable, attend: Callable, dtype: torch.dtype) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_(gradients)
        with (torch.set_grad_enabled(gradients),
              torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16" and dtype == torch.float32)):
            out = function(leaf, rope, attend)
        found = torch.autograd.grad(out, [leaf, *weights], upstream.to(dtype)) if gradients else ()
        return [t.detach() for t in (out, *found)]

    found, plain = tensors(run, flex, torch.float32), tensors(block, sdpa, torch.float32)
    wide = copy.deepcopy(block).double()
    weights = [wide.attention.wqkv.weight, wide.attention.wo.weight]
    exact = tensors(wide, sdpa, torch.float64)
    return [rms_difference(*given, precision) for given in zip(names, found, plain, exact)]


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    subject = Subject.from_json(question)
    if torch.device(subject.device).type == "cuda":
        torch.cuda.set_device(subject.device)  # nothing of this process may lie on another rank's device
    if subject.matmul != "none":
        torch.backends.cuda.matmul.fp32_precision = subject.matmul
    return examine(subject).to_json()


if __name__ == "__main__":
    serve(_answer)
