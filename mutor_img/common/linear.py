"""The linear layer of the transformer: PyTorch's; under autocast on a CPU some products are made in blocks of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 512  # rows of a product at a time
_THREADS, _ROWS, _COLUMNS = 2, range(BLOCK + 1, 3 * BLOCK), range(512, 1024)  # where this was measured to be faster


class Linear(nn.Linear):
    """y = x weight', without a bias.

    Of two threads, oneDNN has only one compute a bf16 product of about a thousand rows and few columns: 1024 x 2048 by
    2048 x 768 takes 1.7 times as long as in blocks of 512 rows. Under autocast on a CPU with two threads such products
    are made in these blocks, forward and for the gradient of x. Which ones is a matter of their shapes, so that the
    same run gives the same bits; a block may sum in another order than the whole. With one thread, blocks are slower.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (.., outputs) of x (.., inputs)."""
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return F.linear(x, self.weight)
        dtype = torch.get_autocast_dtype("cpu")
        made = _Blocks.apply(x.to(dtype).flatten(0, -2), self.weight.to(dtype))
        return made.unflatten(0, x.shape[:-1])


class _Blocks(torch.autograd.Function):
    """x weight', of x (R, inputs) and weight (outputs, inputs)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        """Return (R, outputs)."""
        ctx.save_for_backward(x, weight)
        return _product(x, weight.T)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients (R, inputs) and (outputs, inputs) of grad (R, outputs)."""
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return _product(grad, weight) if wanted[0] else None, grad.T @ x if wanted[1] else None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return (R, K) by (K, columns)."""
    if _threads() == _THREADS and len(left) in _ROWS and right.shape[1] in _COLUMNS:
        return torch.cat([rows @ right for rows in left.split(BLOCK)])
    return left @ right


@torch.compiler.assume_constant_result
def _threads() -> int:
    """Return how many threads compute a product; a compiled layer keeps the answer of its compilation."""
    return torch.get_num_threads()
