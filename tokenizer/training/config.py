"""The config of a tokenizer's training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from mutor_img.common.config import OptimConfig, TrainConfig
from mutor_img.common.errors import UserError, check_range
from tokenizer.network.vq import VQModel, preset
from tokenizer.training.discriminator import patches
from tokenizer.training.losses import check_terms
from tokenizer.training.perceptual import SMALLEST


@dataclass
class ImagesConfig:
    """The images."""

    images: str = "imagenet/train"  # folder of images, in class folders or not
    val_images: str | None = None  # the same for held-out images; null: no validation
    val_count: int = 1000  # number of held-out images to use, spread evenly over the folder
    image_size: int = 256  # pixels per side
    mirror: bool = True  # flip each sample with probability 1/2
    crop_min: float = 0.8  # smallest share of the shorter side that a random crop keeps; 1: centre crop
    workers: int = 8  # reading threads per process

    def validate(self) -> None:
        """Raise :class:`UserError` for a value out of range."""
        check_range("data.val_count", self.val_count, 1, 10**9)
        check_range("data.crop_min", self.crop_min, 0.1, 1.0)
        check_range("data.workers", self.workers, 1, 256)


@dataclass
class VQConfig:
    """The network: a preset, and what differs from it."""

    preset: str = "vq16"  # vq16, vq8, mnist
    image_channels: int | None = None  # 1 or 3; null: the preset's
    channels: int | None = None  # channels at full resolution; null: the preset's
    multipliers: list[int] = field(default_factory=list)  # channels of each level, in multiples; []: the preset's
    vocabulary: int | None = None  # number of codes; null: the preset's
    code_dim: int | None = None  # numbers per code; null: the preset's
    local: bool | None = None  # whether codes depend on their own square of pixels alone; null: the preset's

    def options(self) -> dict[str, Any]:
        """Return the constructor arguments of :class:`~tokenizer.network.vq.VQModel`."""
        names = ("image_channels", "channels", "vocabulary", "code_dim", "local")
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return preset(self.preset) | own | ({"multipliers": tuple(self.multipliers)} if self.multipliers else {})


@dataclass
class LossConfig:
    """What is minimised; every term is logged unweighted."""

    terms: dict[str, float] = field(default_factory=lambda: {"l2": 1.0})  # reconstruction terms by name: l2, lpips
    lpips_weights: str | None = None  # folder of vgg16-397923af.pth and vgg.pth; null: torch's cache, package lpips
    codebook: float = 1.0  # weight of the term that pulls codes towards latents
    commitment: float = 0.25  # weight of the term that pulls latents towards codes
    entropy: float = 0.0  # weight of the term that makes choices certain and uses all codes equally; 0: off
    adversarial_weight: float = 0.0  # weight of a discriminator's judgement; 0: no discriminator
    adversarial_start: int = 20_000  # first update in which the discriminator judges and learns
    discriminator_channels: int = 64  # channels of its first layer
    discriminator_layers: int = 3  # number of its strided convolutions

    def validate(self) -> None:
        """Raise :class:`UserError` for a value out of range, or an unknown reconstruction term."""
        for name in ("codebook", "commitment", "entropy", "adversarial_weight"):
            check_range(f"loss.{name}", getattr(self, name), 0.0, 1e6)
        check_range("loss.adversarial_start", self.adversarial_start, 0, 10**9)
        check_range("loss.discriminator_channels", self.discriminator_channels, 1, 1024)
        check_range("loss.discriminator_layers", self.discriminator_layers, 1, 8)
        problem = check_terms(self.terms)
        if problem:
            raise UserError(problem)


@dataclass
class RevivalConfig:
    """Codes that nothing chooses get no gradient: they are moved onto latents of the current batch."""

    after: int = 100  # updates that a code may stay unused; 0: never revive
    until: float = 0.8  # share of the run after which codes are no longer moved

    def validate(self) -> None:
        """Raise :class:`UserError` for a value out of range."""
        check_range("revival.after", self.after, 0, 10**9)
        check_range("revival.until", self.until, 0.0, 1.0)


@dataclass
class TokenizerConfig:
    """A tokenizer's training run."""

    run_dir: str = ""  # folder of the run; empty: the config's path, with runs/ instead of configs/
    seed: int = 0  # seed of the weights, data order, crops and mirrors
    data: ImagesConfig = field(default_factory=ImagesConfig)
    model: VQConfig = field(default_factory=VQConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    revival: RevivalConfig = field(default_factory=RevivalConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def inputs(self) -> dict[str, Any]:
        """Return every path that a run reads, by its key."""
        return {"data.images": self.data.images, "data.val_images": self.data.val_images,
                "loss.lpips_weights": self.loss.lpips_weights}

    def validate(self) -> None:
        """Raise :class:`UserError` for a network that cannot be built, or images too small for it or for its losses."""
        with torch.device("meta"):
            VQModel(**self.model.options()).grid_for(self.data.image_size)
        size, loss = self.data.image_size, self.loss
        if loss.adversarial_weight and patches(size, loss.discriminator_layers) < 1:
            raise UserError(f"loss.discriminator_layers is {loss.discriminator_layers}, too many for images of {size} "
                            "pixels; take fewer")
        if loss.terms.get("lpips") and size < SMALLEST:
            raise UserError(f"data.image_size is {size}, but LPIPS needs {SMALLEST} pixels per side; set "
                            "loss.terms.lpips=0")
