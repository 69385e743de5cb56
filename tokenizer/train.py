"""``python -m tokenizer.train``: train a VQ tokenizer on a folder of images, in the shared training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mutor_img.cli import run
from mutor_img.config import OptimConfig, TrainConfig
from mutor_img.errors import UserError, check_range
from mutor_img.images import to_nhwc, write_png
from mutor_img.streams import Stream, generator_seed, integers
from mutor_img.training.command import parse_training, run_task
from mutor_img.training.runtime import Runtime
from mutor_img.training.task import Task
from tokenizer.crops import to_float
from tokenizer.folder import list_images
from tokenizer.losses import ReconstructionLoss, check_terms
from tokenizer.measures import psnr
from tokenizer.pictures import before_after
from tokenizer.quantizer import Quantised, perplexity
from tokenizer.training_images import TrainingImages, read_all
from tokenizer.vq import VQModel, preset

_VALIDATION_BATCH = 32
_PICTURES = 10


@dataclass
class DataConfig:
    """The images."""

    images: str = "imagenet/train"  # folder with one sub-folder of images a class
    val_images: str | None = None  # held-out images, likewise; null: no validation
    val_count: int = 1000  # held-out images used, spread evenly over the folder
    image_size: int = 256  # pixels a side
    mirror: bool = True  # flip every second sample, by draw
    crop_min: float = 0.8  # smallest share of the shorter side that a random crop keeps; 1: centre crop
    workers: int = 8  # reading threads a process

    def validate(self) -> None:
        check_range("data.val_count", self.val_count, 1, 10**9)
        check_range("data.crop_min", self.crop_min, 0.1, 1.0)
        check_range("data.workers", self.workers, 1, 256)


@dataclass
class ModelConfig:
    """The network: a preset, and what differs from it."""

    preset: str = "vq16"  # vq16, vq8, mnist
    image_channels: int | None = None  # 1 or 3; null: the preset's, as below
    channels: int | None = None  # width at full resolution
    vocabulary: int | None = None  # number of codes
    code_dim: int | None = None  # numbers a code

    def options(self) -> dict[str, Any]:
        """Return the constructor arguments of :class:`~tokenizer.vq.VQModel`."""
        names = ("image_channels", "channels", "vocabulary", "code_dim")
        return preset(self.preset) | {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class LossConfig:
    """Weights."""

    terms: dict[str, float] = field(default_factory=lambda: {"l2": 1.0})  # reconstruction terms by name
    codebook: float = 1.0  # codes towards latents
    commitment: float = 0.25  # latents towards codes

    def validate(self) -> None:
        check_range("loss.codebook", self.codebook, 0.0, 1e6)
        check_range("loss.commitment", self.commitment, 0.0, 1e6)
        problem = check_terms(self.terms)
        if problem:
            raise UserError(problem)


@dataclass
class RevivalConfig:
    """Codes that nothing chooses get no gradient: they are moved onto latents of the current batch."""

    after: int = 100  # updates a code may go unused; 0: never revive
    until: float = 0.8  # share of the run after which no code is moved any more

    def validate(self) -> None:
        check_range("revival.after", self.after, 0, 10**9)
        check_range("revival.until", self.until, 0.0, 1.0)


@dataclass
class TokenizerConfig:
    """A tokenizer's training run."""

    run_dir: str = ""  # empty: the config's path with configs/ read as runs/
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    revival: RevivalConfig = field(default_factory=RevivalConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def validate(self) -> None:
        with torch.device("meta"):
            VQModel(**self.model.options()).grid_for(self.data.image_size)


class TokenizerTask(Task):
    """Train a :class:`~tokenizer.vq.VQModel` to reproduce images."""

    unit = "images"
    units_per_sample = 1

    def __init__(self, config: TokenizerConfig, runtime: Runtime):
        """List the images, read them where they are few, and build the model.

        Raises:
            UserError: folders that are missing or hold no classes, or unreadable images.
        """
        self.config, self.runtime = config, runtime
        data = config.data
        torch.manual_seed(generator_seed(config.seed, Stream.INIT))
        self.model = VQModel(**config.model.options())
        self.images = TrainingImages(
            list_images(data.images), self.model.image_channels, data.image_size, seed=config.seed,
            mirror=data.mirror, crop_min=data.crop_min, workers=data.workers)
        self.val_images: Tensor | None = None
        if data.val_images:
            held_out = list_images(data.val_images)
            self.val_images = read_all(held_out, held_out.spread(data.val_count), self.model.image_channels,
                                       data.image_size, self.images.pool)  # (n, C, H, W) uint8
        self.reconstruction = ReconstructionLoss(config.loss.terms)
        self.headline = ("loss", *self.reconstruction.terms, "commitment")
        self.flops_per_sample = 3 * forward_flops(config)
        self.seen: list[tuple[int, Quantised]] = []  # first sample number and codes of each micro-batch of an update

    def loss(self, model: nn.Module, step: int, samples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # The layout of the fastest convolutions, which every activation inherits. Weights keep the default one: fused
        # AdamW walks over weights and restored moments alike, whatever their strides.
        images = self.images.batch(samples).contiguous(memory_format=torch.channels_last)  # (b, C, H, W)
        reconstruction, quantised = model(images)
        self.seen.append((int(samples[0]), quantised))
        total, values = self.reconstruction(reconstruction, images, step)
        weights = self.config.loss
        total = total + weights.codebook * quantised.losses["codebook"]
        total = total + weights.commitment * quantised.losses["commitment"]
        share = len(samples) / self.config.train.global_batch
        return total * share, {name: value * share for name, value in {**values, **quantised.losses}.items()}

    @torch.no_grad()
    def after_update(self, model: nn.Module, step: int) -> dict[str, float]:
        """Count the global batch's use of each code, and move codes that went unused for too long."""
        quantizer, revival = model.quantize, self.config.revival
        indices = torch.cat([quantised.indices.flatten() for _, quantised in self.seen])
        counts = self.runtime.sum(torch.bincount(indices, minlength=quantizer.vocabulary))
        quantizer.note_use(counts)
        if revival.after and step < revival.until * self.config.train.steps:
            dead = quantizer.idle(revival.after)
            if len(dead):
                quantizer.reseed(dead, self._draw_latents(step, dead))
        self.seen.clear()
        return {"codes_used": float((counts > 0).double().mean()), "perplexity": perplexity(counts)}

    def _draw_latents(self, step: int, codes: Tensor) -> Tensor:
        """Return a unit latent of the global batch for each code: (n,) -> (n, code_dim), the same on all processes.

        Which latent that is depends on (seed, step, code) only. A process fills in those that it holds.
        """
        rows = torch.cat([q.unit.permute(0, 2, 3, 1).flatten(0, 2) for _, q in self.seen])  # (local * h * w, code_dim)
        batch = self.config.train.global_batch
        each = self.seen[0][1].indices.shape[1]  # h * w
        draws = integers(batch * each, self.config.seed, Stream.INIT, step, codes)  # (n,)
        local = draws - (self.seen[0][0] - step * batch) * each
        held = (local >= 0) & (local < len(rows))
        found = torch.where(held[:, None], rows[local.clamp(0, len(rows) - 1)], 0.0)
        return self.runtime.sum(found)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Return PSNR in dB, the share of codes used and their perplexity on the held-out images."""
        if self.val_images is None:
            return {}
        device, world = self.runtime.device, self.runtime.world
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        counts = torch.zeros(model.vocabulary, dtype=torch.int64, device=device)
        for images in self.val_images[self.runtime.rank:: world].split(_VALIDATION_BATCH):
            images = to_float(images.to(device))
            reconstruction, quantised = model(images)
            sums[0] += psnr(to_nhwc(images), to_nhwc(reconstruction)) * len(images)
            sums[1] += len(images)
            counts += torch.bincount(quantised.indices.flatten(), minlength=model.vocabulary)
        total, count = self.runtime.sum(sums).tolist()
        counts = self.runtime.sum(counts)
        return {"val_psnr": total / count, "val_codes_used": float((counts > 0).double().mean()),
                "val_perplexity": perplexity(counts)}

    def draw_pictures(self, model: nn.Module, folder: Path, step: int) -> None:
        if self.val_images is not None:
            images = to_float(self.val_images[:: -(-len(self.val_images) // _PICTURES)]).to(self.runtime.device)
        else:
            images = self.images.batch(torch.arange(_PICTURES, device=self.runtime.device))
        reconstruction, _ = model(images)
        write_png(folder / f"reconstructions_{step:08d}.png", before_after(to_nhwc(images), to_nhwc(reconstruction)))

    def compile(self) -> None:
        for part in (self.model.encoder, self.model.decoder):
            part.compile(dynamic=False)

    def metadata(self) -> dict[str, Any]:
        return {"kind": "tokenizer", "model": self.model.options, "image_size": self.config.data.image_size}


def forward_flops(config: TokenizerConfig) -> int:
    """Return the FLOPs of one image's reconstruction, counted operation by operation on shapes alone."""
    size = config.data.image_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = VQModel(**config.model.options())
        model(torch.empty(1, model.image_channels, size, size))
    return counter.get_total_flops()


def plan_tokenizer(config: TokenizerConfig) -> dict[str, Any]:
    """Return what ``--dry-run`` prints: parameters, codes and FLOPs an update, memory a device. Needs no images."""
    with torch.device("meta"):
        model = VQModel(**config.model.options())
    parameters = sum(weight.numel() for weight in model.parameters())
    rows, columns = model.grid_for(config.data.image_size)
    batch, flops = config.train.global_batch, 3 * forward_flops(config)
    gib = 2.0**30
    return {
        "parameters": parameters,
        "codes an image": rows * columns,
        "vocabulary": model.vocabulary,
        "images an update": batch,
        "tokens an update": batch * rows * columns,
        "FLOPs an update": batch * flops,
        "updates": config.train.steps,
        "FLOPs in all": batch * flops * config.train.steps,
        "memory a device: weights, GiB": 4 * parameters / gib,
        "memory a device: gradients, GiB": 4 * parameters / gib,
        "memory a device: optimiser, GiB": 8 * parameters / gib,
        "memory a device: EMA, GiB": (4 * parameters if config.train.ema else 0) / gib,
    }


def main(argv: Sequence[str]) -> None:
    """Train a tokenizer."""
    config = parse_training(
        argv, TokenizerConfig, plan_tokenizer,
        description="Train a VQ tokenizer on a folder of images (one sub-folder a class). To resume, run the same "
                    "command again.",
        example="python -m tokenizer.train --config configs/mnist/tokenizer.yaml optim.lr=1e-3")
    if config is not None:
        run_task(TokenizerTask, config)


if __name__ == "__main__":
    run(main)
