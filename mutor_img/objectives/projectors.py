"""Small networks on the trunk's states, and what they are held against: vectors that no gradient moves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from mutor_img.blocks import draw_weights

WIDTH = 2048  # of the inner layers, in Mirai as in reAR


def projector(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Return linear layers with biases from width to width, and an activation between two of them.

    Weights are drawn from N(0, 0.02), by torch's current generator; biases are 0.
    """
    layers = [part for sizes in pairwise(widths) for part in (nn.Linear(*sizes), activation())][:-1]
    network = nn.Sequential(*layers)
    draw_weights(network)
    return network


def projector_flops(network: nn.Sequential) -> float:
    """Return the FLOPs of one row's forward pass: those of matrix products."""
    return sum(2.0 * part.weight.numel() for part in network if isinstance(part, nn.Linear))


def projector_numbers(network: nn.Sequential) -> int:
    """Return how many numbers per row stay for the backward pass: what each layer reads, and what it makes."""
    return sum(sum(part.weight.shape) for part in network if isinstance(part, nn.Linear))


def cosine(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the cosine of the angle between vectors, (..., F) and (..., F) to (...) fp32."""
    return F.cosine_similarity(found.float(), wanted.float(), dim=-1)
