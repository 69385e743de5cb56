"""What makes a reconstruction good: a list of weighted terms, by name.

A term that needs weights of its own reads them when it is made, once per run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mutor_img.common.errors import suggest
from tokenizer.training.perceptual import load_lpips


class Term(Protocol):
    """One term of the reconstruction loss."""

    def __call__(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Return the mean over the images given: both (B, C, H, W) fp32 in about [-1, 1] -> scalar."""


def make_l2(device: torch.device, lpips_weights: str | None) -> Term:
    """Return the mean squared error of pixels in [-1, 1] (LlamaGen's reconstruction term)."""
    return F.mse_loss


def make_lpips(device: torch.device, lpips_weights: str | None) -> Term:
    """Return the mean of LPIPS on ``device``, with the weights of a folder as in :func:`load_lpips`.

    Raises:
        UserError: they are missing or not the published ones.
    """
    lpips = load_lpips(lpips_weights, device)
    return lambda reconstruction, images: lpips(reconstruction, images).mean()


TERMS: dict[str, Callable[[torch.device, str | None], Term]] = {"l2": make_l2, "lpips": make_lpips}


class ReconstructionLoss:
    """A weighted sum of terms.

    Args:
        weights: weight by name in ``TERMS``; a weight of 0 leaves its term out.
        device: where a term's own weights go.
        lpips_weights: folder of LPIPS's two files, or None, see :func:`~tokenizer.training.perceptual.find_files`.
    """

    def __init__(self, weights: dict[str, float], device: torch.device, lpips_weights: str | None = None):
        self.terms = {name: (weight, TERMS[name](device, lpips_weights)) for name, weight in weights.items() if weight}

    def __call__(self, reconstruction: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum, and each term unweighted by name; all are means over the images given."""
        reconstruction, images = reconstruction.float(), images.float()
        values = {name: term(reconstruction, images) for name, (_, term) in self.terms.items()}
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
