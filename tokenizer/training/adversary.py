"""The discriminator's part of a tokenizer's training: its loss for the tokenizer, and its own gradients and optimiser.

Tokenizer and discriminator take turns on one reconstruction (LlamaGen, arXiv 2406.06525, section 2.1): both gradients
are made with the weights from before the update, and the weights move only once both are known to be finite.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from mutor_img.checkpoints.folder import load_strict, open_group, read_meta, read_tensors
from mutor_img.checkpoints.tensor_files import has_group
from mutor_img.common.config import OptimConfig
from mutor_img.common.errors import UserError
from mutor_img.training.optimizer import (
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
    take_step,
)
from mutor_img.training.runtime import Runtime
from tokenizer.training.discriminator import PatchDiscriminator, discriminator_loss, generator_loss

_WEIGHTS, _MOMENTS = "discriminator", "discriminator_optimizer"  # a checkpoint's files


class Adversary:
    """A discriminator that is trained beside the tokenizer.

    Args:
        discriminator: with its first weights.
        config: of its optimiser, the tokenizer's.
        weight: of the adversarial term. It scales the discriminator's own loss too, as LlamaGen's does; Adam does not
            care, and the clipping of the gradient norm does.
        runtime: this process.

    BatchNorm takes its statistics over one micro-batch, of images and of reconstructions apart: the curve depends on
    the images of a micro-batch, and on nothing else of how the global batch is shared out.
    """

    def __init__(self, discriminator: PatchDiscriminator, config: OptimConfig, weight: float, runtime: Runtime):
        self.discriminator = discriminator.to(runtime.device)
        self.optimizer = build_optimizer(self.discriminator, config)
        self.clip, self.weight, self.runtime = config.clip, weight, runtime
        self.pairs: list[tuple[Tensor, Tensor]] = []  # images and reconstructions of each micro-batch of an update

    def judge(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the tokenizer's loss on a micro-batch, not weighted; both (b, C, H, W).

        Its gradient reaches the reconstruction and not the discriminator. The pair is kept for :meth:`learn`.
        """
        self.pairs.append((images, reconstruction.detach()))
        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        return generator_loss(functional_call(self.discriminator, frozen, (reconstruction,)))

    def learn(self, global_batch: int, precision: str) -> dict[str, Tensor]:
        """Make the discriminator's gradients over the global batch from what was judged, and clip their norm.

        Args:
            global_batch: images of one update over all processes.
            precision: ``"bf16"`` or ``"fp32"``.

        Returns:
            Scalars: ``discriminator``, its hinge loss, not weighted; ``logits_real`` and ``logits_fake``, mean logits
            of images and of reconstructions; ``discriminator_gradient_norm``. The same on all ranks.
        """
        sums = torch.zeros(3, device=self.runtime.device)
        for images, reconstruction in self.pairs:
            share = len(images) / global_batch
            with self.runtime.autocast(precision):
                real, fake = self.discriminator(images), self.discriminator(reconstruction)
            loss = discriminator_loss(real, fake)
            (self.weight * share * loss).backward()
            sums += share * torch.stack([loss.detach(), real.detach().float().mean(), fake.detach().float().mean()])
        self.pairs.clear()
        parameters = list(self.discriminator.parameters())
        gradients = [weight.grad for weight in parameters]
        joined = self.runtime.sum(torch.cat([gradient.flatten() for gradient in gradients]))  # one all-reduce
        for gradient, part in zip(gradients, joined.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))
        norm = clip_gradients(parameters, self.clip)
        loss, real, fake = self.runtime.sum(sums)
        return {"discriminator": loss, "logits_real": real, "logits_fake": fake, "discriminator_gradient_norm": norm}

    def step(self, lr: float, skipped: Tensor) -> None:
        """Move the discriminator's weights along the gradients of :meth:`learn`, but where ``skipped``, () bool."""
        take_step(self.optimizer, lr, skipped)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return weights and optimiser state, as two groups of named tensors."""
        return {_WEIGHTS: self.discriminator.state_dict(),
                _MOMENTS: optimizer_tensors(self.discriminator, self.optimizer)}

    def resume(self, folder: Path) -> None:
        """Restore :meth:`tensors` from a checkpoint folder.

        Raises:
            UserError: the checkpoint holds no discriminator, or another one.
        """
        if not has_group(read_meta(folder)["files"], _WEIGHTS):
            raise UserError(f"{folder}: was trained without a discriminator; give another run_dir, or "
                            "loss.adversarial_weight=0 to continue without one")
        load_strict(self.discriminator, read_tensors(folder, _WEIGHTS), folder / f"{_WEIGHTS}.safetensors")
        load_optimizer_tensors(self.discriminator, self.optimizer, open_group(folder, _MOMENTS))
