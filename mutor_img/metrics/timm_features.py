"""The pooled features of any timm model with local weights, for a Frechet distance that is named after them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import load_checkpoint
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, normalize, resize

from mutor_img.common.errors import UserError, first_line, suggest
from mutor_img.common.files import file_hash
from mutor_img.common.full_precision import full_precision
from mutor_img.metrics.features import to_nchw
from mutor_img.metrics.networks import PREFIX


class TimmFeatures:
    """A timm model as a feature network: "pool" (B, D), what its classifier would see.

    The whole image is resized to the model's input size (antialiased, with the model's own interpolation, never
    cropped) and normalised by the model's mean and deviation.
    """

    def __init__(self, model: torch.nn.Module, name: str, weights_hash: str, device: torch.device | str = "cpu"):
        self.device, self.name, self.weights_hash = torch.device(device), name, weights_hash
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.data = resolve_model_data_config(model)
        self.warnings = [f"features are those of {name}: the distance is no FID, and is to be compared with others of "
                         "the same weights only"]
        blank = np.zeros((1, *self.data["input_size"][1:], 3), np.uint8)
        self.dimensions = {"pool": self(blank)["pool"].shape[1]}

    @full_precision()
    def __call__(self, images: np.ndarray | Tensor) -> dict[str, Tensor]:
        """uint8 images of any size, grey or RGB, in either layout -> "pool" (B, D) float32."""
        pixels = to_nchw(images).to(self.device).float().expand(-1, 3, -1, -1) / 255  # (B, 3, H, W)
        size = self.data["input_size"][1:]
        if pixels.shape[2:] != size:
            pixels = resize(pixels, size, InterpolationMode(self.data["interpolation"]), antialias=True).clamp(0, 1)
        pixels = normalize(pixels, list(self.data["mean"]), list(self.data["std"]))
        pool = self.model.forward_head(self.model.forward_features(pixels), pre_logits=True)
        return {"pool": pool.flatten(1).float()}


def load_timm(name: str, weights: str | os.PathLike, device: torch.device | str = "cpu") -> TimmFeatures:
    """Build the timm model ``name`` ("timm:" before it or not) and load ``weights`` strictly; nothing is downloaded.

    Raises:
        UserError: no such model, no such file, or weights of something else.
    """
    short, path = name.removeprefix(PREFIX), Path(weights)
    known = timm.list_models()
    if short.split(".")[0] not in known:
        raise UserError(f"--features {PREFIX}{short}: timm has no such model{_nearest(short, known)}")
    if not path.is_file():
        raise UserError(f"--features-weights {path}: no such file; give the weights of {short} (safetensors or pth)")
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(short, pretrained=False)
    try:
        load_checkpoint(model, str(path), strict=True, weights_only=True)
    except Exception as error:  # a foreign file can fail in any way while it is read
        raise UserError(f"{path}: no weights of {short} ({first_line(error)[:160]})") from None
    return TimmFeatures(model, PREFIX + short, file_hash(path), device)


def _nearest(name: str, known: list[str]) -> str:
    """Return the hint where one is near; all thousand names would be no help."""
    hint = suggest(name, known)
    return hint if "did you mean" in hint else "; timm.list_models() names them"
