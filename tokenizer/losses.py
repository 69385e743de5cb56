"""What makes a reconstruction good: a list of weighted terms, by name.

A term that needs weights of its own is a class in ``TERMS``; instances are made once a run and called each update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from mutor_img.errors import suggest


class Term(Protocol):
    """One term of the reconstruction loss."""

    def __call__(self, reconstruction: Tensor, images: Tensor, step: int) -> Tensor:
        """Return the mean over the images given: both (B, C, H, W) fp32 in about [-1, 1] -> scalar."""


class L2:
    """Mean squared error of pixels in [-1, 1] (LlamaGen's reconstruction term)."""

    def __call__(self, reconstruction: Tensor, images: Tensor, step: int) -> Tensor:
        return F.mse_loss(reconstruction, images)


TERMS: dict[str, Callable[[], Term]] = {"l2": L2}


class ReconstructionLoss:
    """A weighted sum of terms.

    Args:
        weights: weight by name in ``TERMS``; a weight of 0 leaves its term out.
    """

    def __init__(self, weights: dict[str, float]):
        self.terms = {name: (weight, TERMS[name]()) for name, weight in weights.items() if weight}

    def __call__(self, reconstruction: Tensor, images: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum, and each term unweighted by name; all are means over the images given."""
        reconstruction, images = reconstruction.float(), images.float()
        values = {name: term(reconstruction, images, step) for name, (_, term) in self.terms.items()}
        return sum(self.terms[name][0] * value for name, value in values.items()), values


def check_terms(weights: dict[str, float]) -> str | None:
    """Return what is wrong with a table of weights, or None."""
    for name, weight in weights.items():
        if name not in TERMS:
            return f"loss.terms names {name!r}{suggest(name, TERMS)}"
        if not weight >= 0:
            return f"loss.terms.{name} is {weight}; give 0 or more"
    if not any(weights.values()):
        return "loss.terms has no weight above 0, so that nothing would be learnt"
    return None
