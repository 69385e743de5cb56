"""Feature networks: what turns images into the numbers that scores are made of.

A feature network is anything with the attributes of :class:`FeatureNetwork`. The evaluator knows no more of it, but
for the ``class_names`` of a network whose logits are classes: then it also counts the images that are recognised.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mutor_img.common.errors import UserError


class FeatureNetwork(Protocol):
    """What the evaluator asks of a network.

    Attributes:
        name: written into every result and every statistics file.
        weights_hash: sha256 of the weights file, hexadecimal.
        dimensions: numbers per image for each output, e.g. ``{"pool": 2048, "spatial": 2023, "logits": 1008}``.
            "pool" feeds the Frechet distance, precision and recall; "spatial" sFID; "logits" the Inception Score.
        warnings: why scores made with it are not comparable with published ones; empty if they are.
        device: where it runs.
    """

    name: str
    weights_hash: str
    dimensions: dict[str, int]
    warnings: list[str]
    device: torch.device

    def __call__(self, images: np.ndarray | Tensor) -> dict[str, Tensor]:
        """(B, H, W, C) or (B, C, H, W) uint8, C 1 or 3 -> one (B, dimension) float32 tensor an output."""
        ...


def to_nchw(images: np.ndarray | Tensor) -> Tensor:
    """Return uint8 images as (B, C, H, W), C being 1 or 3; (B, H, W, C) is recognised by its last size.

    Raises:
        UserError: not uint8, or no axis of 1 or 3 channels.
    """
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8:
        raise UserError(f"images are {images.dtype}; features are defined for uint8 in 0..255")
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images.permute(0, 3, 1, 2)
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    raise UserError(f"images have shape {tuple(images.shape)}; give (B, H, W, C) or (B, C, H, W) with 1 or 3 channels")
