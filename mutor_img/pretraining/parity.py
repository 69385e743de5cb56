"""Attention backends against exact attention: outputs and gradients, and how far rounding may move them.

The exact side is attention in float64 with the rule evaluated on every cell. What a fused kernel may differ from it by
is not a tolerance chosen by eye but a bound carried along the computation, cell by cell (running error analysis:
Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.3). So that a wrong cell of the mask shows where a
row's values are small, and honest rounding passes where they are large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mutor_img.attention import may_attend

# Relative error of fp32 sums, in which every kernel accumulates: 16 roundings, a random walk over some hundred terms.
SUM = 2.0**-20
SLACK = 2.0  # the bound is of first order and knows nothing of a kernel's running maximum and its corrections

PLAIN_FACTOR = 3.0
FLOORS = {"bf16": 2.0**-7, "fp32": 2.0**-14}

M = TypeVar("M", bound=nn.Module)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Difference:
    """One tensor's difference from the exact one, at the place where it is largest for what is allowed there.

    Attributes:
        tensor: what is compared: ``output``, or ``gradient of`` q, k, v, the input or a weight.
        error: absolute difference; NaN where the tensor is not finite.
        allowed: what rounding may amount to at that place.
    """

    tensor: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether rounding explains it; a NaN is never explained."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.tensor} differs by {self.error:.3g} where {self.allowed:.3g} is allowed"

    def to_json(self) -> dict[str, Any]:
        """Return plain values; a NaN as text, which JSON has no number for."""
        error = self.error if self.error == self.error else "nan"
        return {**asdict(self), "error": error, "passed": self.passed}


def dense_mask(anchors: Tensor, length: int) -> Tensor:
    """Return the rule on every cell, (B, 1, N + R, N + R) bool, for anchors (B, R)."""
    places = torch.arange(length + anchors.shape[1], device=anchors.device)
    full = torch.cat([anchors.new_zeros(len(anchors), length), anchors], dim=1)  # (B, N + R)
    return may_attend(places[:, None], places, full[:, :, None], length)[:, None]


def exact_attention(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, mask: Tensor,
                    unit: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Return exact output and gradients by name, each with what rounding may change in it.

    Args:
        q, k, v, upstream: (B, H, S, head dim) float64; ``upstream`` is the gradient that arrives at the output.
        mask: (B, 1, S, S) bool.
        unit: the relative rounding unit of the dtype that the backend reads, multiplies and writes, as bf16's 2^-8.

    Returns:
        ``output``, ``gradient of q``, ``gradient of k``, ``gradient of v``: value and bound, (B, H, S, head dim) each.
        A capital E below is the bound of the letter's error; |P| = P, probabilities being positive.
    """
    scale = q.shape[-1] ** -0.5
    scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)  # (B, H, S, S)
    p = scores.softmax(-1)
    out = p @ v  # (B, H, S, head dim)
    e_scores = SUM * scale * (q.abs() @ k.abs().mT)
    # exp turns the scores' absolute errors into relative ones, the row's sum shares them, and P is rounded to multiply.
    e_p = p * (e_scores + (p * e_scores).sum(-1, keepdim=True) + unit + SUM)
    e_out = e_p @ v.abs() + SUM * (p @ v.abs()) + unit * out.abs()

    d_p = upstream @ v.mT  # (B, H, S, S)
    row = (upstream * out).sum(-1, keepdim=True)  # (B, H, S, 1) = sum of P dP, from the written output
    d_scores = p * (d_p - row)
    e_row = (upstream.abs() * e_out).sum(-1, keepdim=True) + (unit + SUM) * (upstream * out).abs().sum(-1, keepdim=True)
    e_d_p = SUM * (upstream.abs() @ v.abs().mT)
    e_d_scores = e_p * (d_p - row).abs() + p * (e_d_p + e_row) + unit * d_scores.abs()

    def product(left: Tensor, e_left: Tensor, right: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        value = factor * (left @ right)
        bound = factor * ((e_left + SUM * left.abs()) @ right.abs()) + unit * value.abs()
        return value, SLACK * bound

    return {
        "output": (out, SLACK * e_out),
        "gradient of q": product(d_scores, e_d_scores, k, scale),
        "gradient of k": product(d_scores.mT, e_d_scores.mT, q, scale),
        "gradient of v": product(p.mT, e_p.mT, upstream, 1.0),
    }


def compare_attention(attend: Attend, anchors: Tensor, length: int, *, heads: int, head_dim: int, dtype: torch.dtype,
                      seed: int, gradients: bool = True) -> list[Difference]:
    """Run a backend on random inputs and hold output and gradients against exact attention.

    Args:
        attend: takes q, k, v (B, H, N + R, head dim); it knows the anchors already.
        anchors: (B, R) int64, R >= 0, on the device to run on.
        length: N.
        heads, head_dim: sizes of the inputs.
        dtype: of the inputs: bf16 or fp32.
        seed: of the inputs, which are normal with deviation 1: so are the scores, and no row is nearly uniform.
        gradients: compare gradients of q, k and v too.

    Returns:
        One :class:`Difference` per tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (4, len(anchors), heads, length + anchors.shape[1], head_dim)
    *leaves, upstream = torch.randn(shape, generator=generator).to(anchors.device, dtype).unbind()
    leaves = [x.clone().requires_grad_(gradients) for x in leaves]
    with torch.set_grad_enabled(gradients):
        found = [attend(*leaves)]
    if gradients:
        found += torch.autograd.grad(found[0], leaves, upstream)
    exact = exact_attention(*(x.detach().double() for x in (*leaves, upstream)), dense_mask(anchors, length),
                            torch.finfo(dtype).eps / 2)
    return [_difference(name, x.detach(), *exact[name]) for name, x in zip(exact, found)]


def rms_difference(name: str, found: Tensor, plain: Tensor, exact: Tensor, precision: str) -> Difference:
    """Hold a tensor against the exact one in root mean square, where a bound cell by cell would lead too far.

    Args:
        found: what is examined.
        plain: the same by uncompiled torch in the same precision; three times its error is allowed.
        exact: the same in a higher precision.
        precision: ``"bf16"`` or ``"fp32"``: says what is allowed beside that, as a share of the exact
            tensor, since the error of ``plain`` can be small by luck, a scalar's above all.
    """
    found, plain, exact = found.double(), plain.double(), exact.double()
    return Difference(name, _rms(found - exact), PLAIN_FACTOR * _rms(plain - exact) + FLOORS[precision] * _rms(exact))


def draw_at_scale_one(module: M, seed: int) -> M:
    """Draw every weight in place so that activations, scores and logits have scale 1; returns the module.

    At initialisation the head is zero and attention nearly uniform: comparisons would hold for almost any code.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                deviation = 1.0 if isinstance(part, nn.Embedding) else part.in_features**-0.5
                part.weight.normal_(0.0, deviation, generator=generator)
    return module


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _difference(name: str, found: Tensor, value: Tensor, allowed: Tensor) -> Difference:
    error = (found.double() - value).abs()
    ratio = torch.where(error.isfinite(), error / allowed, torch.inf)
    worst = ratio.argmax()
    error, allowed = error.flatten()[worst].item(), allowed.flatten()[worst].item()
    return Difference(name, error, allowed)
