"""``python -m tokenizer.train``: train a VQ tokenizer on a folder of images, in the shared training loop."""

from __future__ import annotations

from dataclasses import asdict

if __name__ == "__main__":
    from mutor_img.common.threads import set_spinning

    set_spinning()  # before torch is loaded

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mutor_img.common.cli import run
from mutor_img.common.images import to_nhwc, write_png
from mutor_img.common.streams import Stream, generator_seed, integers
from mutor_img.training.command import train_command
from mutor_img.training.numbers import read_numbers
from mutor_img.training.optimizer import learning_rate
from mutor_img.training.runtime import Runtime
from mutor_img.training.task import Task
from tokenizer.images.crops import to_float
from tokenizer.images.folder import list_images
from tokenizer.images.source import ImageSource
from tokenizer.measures import psnr
from tokenizer.network.quantizer import Quantised, code_use, count_codes
from tokenizer.network.vq import VQModel
from tokenizer.pictures import before_after
from tokenizer.store import files_hash
from tokenizer.training.adversary import Adversary
from tokenizer.training.config import TokenizerConfig
from tokenizer.training.images import TrainingImages, read_all
from tokenizer.training.losses import ReconstructionLoss
from tokenizer.training.plan import build_discriminator, forward_flops, plan_tokenizer

_VALIDATION_BATCH = 32
_PICTURES = 10


class TokenizerTask(Task):
    """Train a :class:`~tokenizer.network.vq.VQModel` to reproduce images."""

    unit = "images"
    units_per_sample = 1
    operation = "conv"

    def __init__(self, config: TokenizerConfig, runtime: Runtime):
        """List the images, read them where they are few, and build the model.

        Raises:
            UserError: folders that are missing or hold no images, unreadable images, or no weights for LPIPS.
        """
        self.config, self.runtime = config, runtime
        runtime.agree(asdict(config))
        data, loss = config.data, config.loss
        torch.manual_seed(generator_seed(config.seed, Stream.INIT))
        self.model = VQModel(**config.model.options())
        self.model.quantize.with_usage_loss = loss.entropy > 0
        self.adversary: Adversary | None = None
        if loss.adversarial_weight:
            self.adversary = Adversary(build_discriminator(config), config.optim, loss.adversarial_weight, runtime)
        listed, self._images_hash = self._listed(data.images)
        share, _ = config.train.shares(runtime.world, f"{runtime.world} processes")
        self.images = TrainingImages(
            listed, self.model.image_channels, data.image_size, seed=config.seed,
            mirror=data.mirror, crop_min=data.crop_min, workers=data.workers, global_batch=config.train.global_batch,
            share=share)
        self.val_images: Tensor | None = None
        if data.val_images:
            held_out, _ = self._listed(data.val_images)
            self.val_images = read_all(held_out, held_out.spread(data.val_count), self.model.image_channels,
                                       data.image_size, self.images.pool)  # (n, C, H, W) uint8
        self.reconstruction = ReconstructionLoss(loss.terms, runtime.device, loss.lpips_weights)
        self.headline = ("loss", *self.reconstruction.terms, "commitment", "adversarial", "discriminator")
        self._flops = 3 * forward_flops(config)
        self.seen: list[tuple[int, Quantised]] = []  # first sample number and codes of each micro-batch of an update

    def _listed(self, folder: str) -> tuple[ImageSource, str]:
        """Return the images of a folder and the hash of their list, once all processes see the same ones."""
        images = list_images(folder, flat=True)  # classes play no part
        found = files_hash(images)
        self.runtime.agree({f"the list of images in {folder}": found})
        return images, found

    def flops_per_sample(self, step: int) -> float:
        return self._flops

    def loss(self, model: nn.Module, step: int, samples: Tensor,
             average: nn.Module | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this micro-batch's share of the weighted sum of all terms, and of each term unweighted.

        The terms are ``config.loss.terms``, the quantiser's losses and, from ``adversarial_start`` on, ``adversarial``
        (LlamaGen, arXiv 2406.06525, section 2.1).
        """
        images = channels_last(self.images.batch(samples, self.runtime.device))  # (b, C, H, W)
        reconstruction, quantised = model(images)
        self.seen.append((int(samples[0]), quantised))
        total, values = self.reconstruction(reconstruction, images)
        weights = self.config.loss
        terms = {"codebook": weights.codebook, "commitment": weights.commitment, "entropy": weights.entropy,
                 "adversarial": weights.adversarial_weight}
        values.update(quantised.losses)
        if self._judged(step):
            values["adversarial"] = self.adversary.judge(images, reconstruction)
        total = total + sum(terms[name] * value for name, value in values.items() if name in terms)
        share = len(samples) / self.config.train.global_batch
        return total * share, {name: value * share for name, value in values.items()}

    def _judged(self, step: int) -> bool:
        """Tell whether a discriminator has its say in update ``step``."""
        return self.adversary is not None and step >= self.config.loss.adversarial_start

    def before_update(self, step: int) -> dict[str, Tensor]:
        """Make the discriminator's gradients; returns what :meth:`Adversary.learn` does, once it judges."""
        if not self._judged(step):
            return {}
        return self.adversary.learn(self.config.train.global_batch, self.config.train.precision)

    @torch.no_grad()
    def after_update(self, model: nn.Module, step: int, skipped: Tensor) -> dict[str, Tensor]:
        """Move the discriminator, count the use of each code, and move codes that went unused for too long."""
        if self._judged(step):
            self.adversary.step(learning_rate(self.config.optim, step, self.config.train.steps), skipped)
        quantizer, revival = model.quantize, self.config.revival
        indices = torch.cat([quantised.indices.flatten() for _, quantised in self.seen])
        counts = self.runtime.sum(count_codes(indices, quantizer.vocabulary))
        quantizer.note_use(counts, skipped)
        if revival.after and step < revival.until * self.config.train.steps:
            codes = torch.arange(quantizer.vocabulary, device=indices.device)
            quantizer.reseed(quantizer.idle(revival.after) & ~skipped, self._draw_latents(step, codes))
        self.seen.clear()
        return code_use(counts)

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
        mine = self.val_images[self.runtime.rank :: world]  # none, where there are more processes than images
        for images in mine.split(_VALIDATION_BATCH) if len(mine) else ():
            images = to_float(images.to(device))
            reconstruction, quantised = model(images)
            sums[0] += psnr(to_nhwc(images), to_nhwc(reconstruction)) * len(images)
            sums[1] += len(images)
            counts += count_codes(quantised.indices, model.vocabulary)
        total, count = self.runtime.sum(sums)
        use = code_use(self.runtime.sum(counts))
        return read_numbers({"val_psnr": total / count, **{f"val_{name}": value for name, value in use.items()}})

    def draw_pictures(self, model: nn.Module, folder: Path, step: int) -> None:
        if self.val_images is not None:
            images = to_float(self.val_images[:: -(-len(self.val_images) // _PICTURES)]).to(self.runtime.device)
        else:
            images = self.images.batch(torch.arange(_PICTURES), self.runtime.device, ahead=False)
        reconstruction, _ = model(images)
        write_png(folder / f"reconstructions_{step:08d}.png", before_after(to_nhwc(images), to_nhwc(reconstruction)))

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [model.encoder, model.decoder]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return self.adversary.tensors() if self.adversary else {}

    def resume(self, folder: Path) -> None:
        if self.adversary:
            self.adversary.resume(folder)

    def metadata(self) -> dict[str, Any]:
        return {"kind": "tokenizer", "model": self.model.options, "image_size": self.config.data.image_size,
                "images_hash": self._images_hash}


def channels_last(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) in the layout of the fastest convolutions, which every activation inherits.

    Weights keep the default layout: fused AdamW walks over weights and restored moments alike, whatever their strides.
    """
    _, channels, height, width = images.shape
    # With one channel both layouts are the same bytes, torch leaves the strides of the other one, and convolutions go
    # by the strides: so they are set here.
    return images.contiguous(memory_format=torch.channels_last).as_strided(
        images.shape, (height * width * channels, 1, width * channels, channels))


def main(argv: Sequence[str]) -> None:
    """Train a tokenizer."""
    train_command(
        argv, TokenizerTask, TokenizerConfig, plan_tokenizer,
        description="Train a VQ tokenizer on a folder of images, in class folders or not. To resume, run the same "
                    "command again.",
        example="python -m tokenizer.train --config configs/mnist/tokenizer.yaml optim.lr=1e-3")


if __name__ == "__main__":
    run(main)
