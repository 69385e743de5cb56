"""What a model reads out of its residual stream: the last norm, the head and the cross-entropy.

In chunks, the logits are never there as a whole: as many rows at a time as there is memory for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mutor_img.registers import IGNORE, cross_entropy_sum


def read_out_losses(x: Tensor, norm: nn.Module, head: nn.Linear, targets: Sequence[Tensor], rows: int = 0
                    ) -> list[Tensor]:
    """Return the cross-entropy, summed, of what an output head reads in each part of a residual stream.

    Training on GPUs compiles this as one function. For each logit it then keeps the logit alone (2 bytes in bf16) for
    the backward pass, where autograd keeps a log-probability in fp32, and writes and reads about 12 bytes, not 42.

    Args:
        x: (B, S_1 + S_2 + .., dim), before the last norm.
        norm: (B, S, dim) to the same.
        head: dim to V, without a bias.
        targets: for each part (B, S_i) int64, ``IGNORE`` where there is none; or (B, S_i, K), K of each row.
        rows: the most rows of logits at a time; 0: all of a part. Each part has logits of its own: slices of logits
            would be copied, forward and backward, and logits are large.

    Returns:
        For each part a scalar fp32 tensor.
    """
    parts = norm(x).split([part.shape[1] for part in targets], dim=1)  # (B, S_i, dim) each
    if rows:
        return [chunked_cross_entropy_sum(part, head.weight, wanted, rows) for part, wanted in zip(parts, targets)]
    return [cross_entropy_sum(head(part), wanted) for part, wanted in zip(parts, targets)]


def chunked_cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
    """Return ``cross_entropy_sum(hidden @ weight.T, targets)`` with no more than ``rows`` rows of logits at a time.

    A chunk's gradients are computed while its logits are in memory, so nothing is computed twice. Only the gradients
    stay: one of ``hidden``'s size, and one matrix of the head's size in fp32. Logits have autocast's dtype, as those of
    a linear layer would. From there on everything is fp32, up to the gradient of the logits, which is rounded back.
    The head's gradient is a sum in fp32 over chunks.

    Args:
        hidden: (B, S, dim), what the head reads.
        weight: (V, dim), the head.
        targets: (B, S) int64, ``IGNORE`` where there is none; or (B, S, K), K of each row.
        rows: rows of logits at a time, at least 1.

    Returns:
        A scalar fp32 tensor.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(0, 1), rows, wanted)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """See :func:`chunked_cross_entropy_sum`; hidden is (rows, dim) here."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, wanted: bool) -> Tensor:
        """Return the summed loss, an fp32 scalar; if ``wanted``, make both gradients chunk by chunk on the way.

        Args:
            ctx: keeps the gradients for :meth:`backward`.
            hidden: (rows, dim), the states before the output matrix, in the dtype of its product.
            weight: (V, dim).
            targets: (rows,) int64, ``IGNORE`` where there is none.
            rows: rows of logits at a time.
            wanted: whether anything needs gradients.
        """
        total, head = torch.zeros((), device=hidden.device), weight.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden) if wanted else hidden  # (rows, dim)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wanted else None  # (V, dim)
        parts = (x.split(rows) for x in (hidden, hidden_grad, targets))
        for inputs, place, target in zip(*parts, strict=True):
            total += _one_chunk(inputs, head, target, place if wanted else None, weight_grad)
        if wanted:
            ctx.save_for_backward(hidden_grad, weight_grad)
            ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Return the gradients of ``hidden`` and ``weight``, those made in :meth:`forward` times ``grad``, a scalar."""
        hidden_grad, weight_grad = ctx.saved_tensors
        scaled = (hidden_grad.float() * grad).to(hidden_grad.dtype)  # a factor rounded to bf16 would bias every row
        return scaled, (weight_grad * grad).to(ctx.dtype), None, None, None


def _one_chunk(inputs: Tensor, head: Tensor, target: Tensor, hidden_grad: Tensor | None,
               weight_grad: Tensor | None) -> Tensor:
    """Return a chunk's loss; given ``hidden_grad``, fill it and add to ``weight_grad``.

    A function of its own, so that one chunk's logits are gone before the next one's are made.
    """
    log_p = (inputs @ head.T).float().log_softmax(dim=-1)  # (chunk, V)
    target = target.reshape(len(target), -1)  # (chunk, K)
    kept = target != IGNORE
    index = target.where(kept, 0)
    loss = -log_p.gather(1, index).where(kept, 0.0).sum()
    if hidden_grad is not None:  # the slope of each row's loss by its logits: of each target p, less 1 there
        slope = log_p.exp_().mul_(kept.sum(dim=1, keepdim=True)).scatter_add_(1, index, -kept.float())
        slope = slope.to(inputs.dtype)
        torch.mm(slope, head, out=hidden_grad)
        weight_grad += slope.T @ inputs
    return loss
