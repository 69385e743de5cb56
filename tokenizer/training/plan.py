"""What a tokenizer's training will cost, counted on shapes alone: no images, no weights, no GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from mutor_img.training.saved_bytes import SavedBytes, fake_gpu
from tokenizer.network.vq import VQModel
from tokenizer.training.config import TokenizerConfig
from tokenizer.training.discriminator import PatchDiscriminator
from tokenizer.training.perceptual import LPIPS


def plan_tokenizer(config: TokenizerConfig) -> dict[str, Any]:
    """Return what ``--dry-run`` prints: parameters, codes and FLOPs per update, memory per device. Needs no images.

    FLOPs and memory are those of an update with every term on, in eager mode on one GPU: compiled code keeps less.
    """
    with torch.device("meta"):
        model = VQModel(**config.model.options())
        judges = build_discriminator(config) if config.loss.adversarial_weight else nn.Identity()
    parameters, others = (sum(weight.numel() for weight in network.parameters()) for network in (model, judges))
    rows, columns = model.grid_for(config.data.image_size)
    batch, gib = config.train.global_batch, 2.0**30
    judging = loss_flops(config)
    flops = batch * (3 * forward_flops(config) + judging)
    trained = parameters + others
    return {
        "parameters": parameters,
        "parameters of the discriminator": others,
        "codes per image": rows * columns,
        "vocabulary": model.vocabulary,
        "images per update": batch,
        "tokens per update": batch * rows * columns,
        "FLOPs per update": flops,
        "FLOPs per update: in LPIPS and the discriminator": batch * judging,
        "updates": config.train.steps,
        "FLOPs in all": flops * config.train.steps,
        "memory per device: weights, GiB": 4 * trained / gib,
        "memory per device: gradients, GiB": 4 * trained / gib,
        "memory per device: optimiser, GiB": 8 * trained / gib,
        "memory per device: EMA, GiB": (4 * parameters if config.train.ema else 0) / gib,
        "memory per image of a forward pass: activations, GiB": activation_bytes(config) / gib,
    }


def build_discriminator(config: TokenizerConfig) -> PatchDiscriminator:
    """Return the config's discriminator with its first weights, for images of the tokenizer's channels."""
    return PatchDiscriminator(config.model.options()["image_channels"], config.loss.discriminator_channels,
                              config.loss.discriminator_layers)


def forward_flops(config: TokenizerConfig) -> int:
    """Return the FLOPs of one image's reconstruction, counted operation by operation."""
    with torch.device("meta"):
        return _flops(VQModel(**config.model.options()), _image(config))


def activation_bytes(config: TokenizerConfig) -> int:
    """Return the bytes that one more image makes autograd keep, in the tokenizer and in the networks of its loss."""
    lpips = LPIPS() if config.loss.terms.get("lpips") else None
    kept = []
    for count in (1, 2):  # what does not grow, such as weights in bf16, is in both
        with fake_gpu(config.train.precision):
            model, images = VQModel(**config.model.options()), _image(config, "cuda").expand(count, -1, -1, -1)
            frozen = {name: torch.empty(x.shape) for name, x in _state(lpips)} if lpips else {}
            judge = build_discriminator(config).requires_grad_(False) if config.loss.adversarial_weight else None
            with SavedBytes(model.parameters()) as saved:
                reconstruction, *others = model(images)
                if lpips:
                    others += [functional_call(lpips, frozen, (images, reconstruction))]
                if judge:
                    others += [judge(reconstruction)]
            kept.append(saved.bytes)
    return kept[1] - kept[0]


def loss_flops(config: TokenizerConfig) -> int:
    """Return the FLOPs that the loss's own networks add to one image's update.

    LPIPS goes forward for image and reconstruction and back to the latter: three passes over one image. The
    discriminator goes forward and back for the tokenizer, which needs no gradient of its weights: two; and forward and
    back for itself, on both images: six.
    """
    image, flops = _image(config), 0
    if config.loss.terms.get("lpips"):
        flops += _flops(LPIPS().to("meta"), image, image) * 3 // 2
    if config.loss.adversarial_weight:
        flops += 8 * _flops(build_discriminator(config).to("meta"), image)
    return flops


def _state(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [*network.named_parameters(), *network.named_buffers()]


def _image(config: TokenizerConfig, device: str = "meta") -> Tensor:
    channels = config.model.options()["image_channels"]
    return torch.empty(1, channels, config.data.image_size, config.data.image_size, device=device)


def _flops(network: nn.Module, *inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops()
