"""Before a run trains with FlexAttention: is it right, on this machine, for this run's own mask and sizes?

Compiled FlexAttention has given silently wrong or NaN gradients on structured masks, and its kernels are chosen by
GPU, dtype and head dimension. So every run that wants it compares it first, outputs and gradients, with a small batch
and few heads, which decide nothing about the kernel. Where it differs or does not compile, training goes on with
``scaled_dot_product_attention``, which is slower and computes the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mutor_img.attention import FlexAttention, SdpaAttention
from mutor_img.common.files import write_json
from mutor_img.pretraining.parity import Difference, compare_attention, draw_at_scale_one, rms_difference
from mutor_img.registers import RegisterLaw, register_ids
from mutor_img.training.compiling import compile_whole
from mutor_img.training.runtime import Runtime
from mutor_img.transformer import Block, ModelConfig, RotaryTable

BATCH, HEADS = 2, 2


@dataclass
class Preflight:
    """What the comparison found.

    Attributes:
        subject: what was compared, in words.
        found: differences by the name of the draw of registers.
        error: what a compilation or a run raised, one line; None where nothing did.
        seconds: how long it took.
        failed_ranks: how many of all processes saw a failure.
    """

    subject: str
    found: list[tuple[str, Difference]] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0
    failed_ranks: int = 0

    @property
    def failures(self) -> list[str]:
        """What differed here, a line each, the error last."""
        lines = [f"{draw}: {difference}" for draw, difference in self.found if not difference.passed]
        return [*lines, self.error] if self.error else lines

    @property
    def passed(self) -> bool:
        """Whether FlexAttention may be used: no process saw a failure."""
        return not self.failures and not self.failed_ranks

    def describe(self) -> str:
        """Return the result for the log, a few lines."""
        if self.passed:
            worst = max((d.error / d.allowed for _, d in self.found if d.allowed), default=0.0)
            return (f"preflight: FlexAttention is right for {self.subject}: {len(self.found)} tensors compared, the "
                    f"worst at {worst:.2f} of what rounding allows ({self.seconds:.0f} s)")
        lines = self.failures or [f"it failed on {self.failed_ranks} other process(es)"]
        more = [f"  and {len(lines) - 6} more"] if len(lines) > 6 else []
        return "\n".join([f"preflight: FlexAttention FAILED for {self.subject}; registers attend by "
                          "scaled_dot_product_attention instead, which is slower and computes the same",
                          *(f"  {line}" for line in lines[:6]), *more])

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a run's metadata."""
        return {"attention": "flex" if self.passed else "sdpa", "subject": self.subject, "failures": self.failures,
                "failed_ranks": self.failed_ranks, "seconds": round(self.seconds, 1), "torch": torch.__version__,
                "compared": [{"draw": draw, **difference.to_json()} for draw, difference in self.found]}

    def record(self, run_dir: str | Path, runtime: Runtime) -> None:
        """Log the result and write ``preflight.json`` into the run's folder; a process of its own failure says so."""
        if runtime.is_main:
            tqdm.write(self.describe())
            write_json(Path(run_dir) / "preflight.json", self.to_json())
        elif self.failures:
            tqdm.write(f"process {runtime.rank}: {self.describe()}")


def preflight(law: RegisterLaw, config: ModelConfig, precision: str, seed: int, runtime: Runtime, *,
              backend: type = FlexAttention, compiled: Callable = compile_whole,
              gradients: bool = True) -> Preflight:
    """Compare FlexAttention with exact attention on this run's mask; every process gets the same verdict.

    Args:
        law: the run's registers.
        config: the run's model.
        precision: ``"bf16"`` or ``"fp32"``.
        seed: the run's.
        runtime: this process; the comparison runs on its device.
        backend, compiled: what is examined and how it is compiled.
        gradients: False compares outputs alone, as on CPUs, where FlexAttention has no backward.
    """
    head_dim, begun = config.dim // config.heads, time.perf_counter()
    result = Preflight(f"{law.registers} registers ({law.kind}) on {law.grid[0]} x {law.grid[1]} codes, head dimension "
                       f"{head_dim}, {precision}")
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    try:
        # A run calls this inside its autocast, which would round what the comparison wants exact.
        with torch.random.fork_rng(devices), torch.autocast(runtime.device.type, enabled=False):
            for found in examine(law, head_dim, precision, seed, runtime.device, backend, compiled, gradients):
                result.found.append(found)
    except Exception as error:  # whatever a compiler or a driver raises means the same: do not use it
        result.error = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    finally:
        torch.compiler.reset()  # the training graphs start with an empty cache
    failed = torch.tensor([float(bool(result.failures))], device=runtime.device)
    result.failed_ranks = int(runtime.sum(failed).item())
    result.seconds = time.perf_counter() - begun
    return result


def examine(law: RegisterLaw, head_dim: int, precision: str, seed: int, device: torch.device, backend: type,
            compiled: Callable, gradients: bool) -> Iterator[tuple[str, Difference]]:
    """Yield every difference with the name of its draw: attention alone first, then inside a compiled block."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    draws = {name: anchors.to(device) for name, anchors in draws_of(law, seed).items()}
    flex = backend(law.length, next(iter(draws.values())), fixed_anchors=law.count is None)
    attend = compiled(lambda q, k, v: flex(q, k, v))
    for number, (name, anchors) in enumerate(draws.items()):
        flex.update(anchors)
        for difference in compare_attention(attend, anchors, law.length, heads=HEADS, head_dim=head_dim, dtype=dtype,
                                            seed=seed + number, gradients=gradients):
            yield name, difference
    torch.manual_seed(seed)
    block = Block(ModelConfig(1, HEADS, HEADS * head_dim, dropout=0.0), drop_path=0.0)
    block = draw_at_scale_one(block, seed).to(device)
    run = compiled(block)
    for name, anchors in draws.items():
        flex.update(anchors)
        for difference in compare_block(block, run, flex, anchors, law.grid, precision, gradients):
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
