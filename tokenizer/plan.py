"""What a tokenizer's training will cost, counted on shapes alone: no images, no weights, no GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tokenizer.config import TokenizerConfig
from tokenizer.discriminator import PatchDiscriminator
from tokenizer.perceptual import LPIPS
from tokenizer.vq import VQModel


def plan_tokenizer(config: TokenizerConfig) -> dict[str, Any]:
    """Return what ``--dry-run`` prints: parameters, codes and FLOPs an update, memory a device. Needs no images.

    FLOPs are those of an update with every term on. Activations are not in the memory.
    """
    with torch.device("meta"):
        model = VQModel(**config.model.options())
        judges = build_discriminator(config) if config.loss.adversarial_weight else nn.Identity()
    parameters, others = (sum(weight.numel() for weight in network.parameters()) for network in (model, judges))
    rows, columns = model.grid_for(config.data.image_size)
    batch, gib = config.train.global_batch, 2.0**30
    flops = batch * (3 * forward_flops(config) + loss_flops(config))
    trained = parameters + others
    return {
        "parameters": parameters,
        "parameters of the discriminator": others,
        "codes an image": rows * columns,
        "vocabulary": model.vocabulary,
        "images an update": batch,
        "tokens an update": batch * rows * columns,
        "FLOPs an update": flops,
        "FLOPs an update: in LPIPS and the discriminator": batch * loss_flops(config),
        "updates": config.train.steps,
        "FLOPs in all": flops * config.train.steps,
        "memory a device: weights, GiB": 4 * trained / gib,
        "memory a device: gradients, GiB": 4 * trained / gib,
        "memory a device: optimiser, GiB": 8 * trained / gib,
        "memory a device: EMA, GiB": (4 * parameters if config.train.ema else 0) / gib,
    }


def build_discriminator(config: TokenizerConfig) -> PatchDiscriminator:
    """Return the config's discriminator with its first weights, for images of the tokenizer's channels."""
    return PatchDiscriminator(_channels(config), config.loss.discriminator_channels, config.loss.discriminator_layers)


def forward_flops(config: TokenizerConfig) -> int:
    """Return the FLOPs of one image's reconstruction, counted operation by operation."""
    with torch.device("meta"):
        return _flops(VQModel(**config.model.options()), _image(config))


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


def _channels(config: TokenizerConfig) -> int:
    with torch.device("meta"):
        return VQModel(**config.model.options()).image_channels


def _image(config: TokenizerConfig) -> Tensor:
    return torch.empty(1, _channels(config), config.data.image_size, config.data.image_size, device="meta")


def _flops(network: nn.Module, *inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops()
