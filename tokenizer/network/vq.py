"""The VQ tokenizer: images to a grid of codes and back.

The network is LlamaGen's (arXiv 2406.06525, section 2.1), so that its released weights load under their own names;
``PRESETS`` holds its two sizes and a small one for 32-pixel digits. With other codes it is also that of
taming-transformers (arXiv 2012.09841), whose names ``tokenizer/foreign.py`` knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mutor_img.common.errors import UserError, check_choice
from tokenizer.network.interface import ImageTokenizer
from tokenizer.network.layers import Decoder, Encoder
from tokenizer.network.quantizer import Quantised, Quantizer

PRESETS: dict[str, dict[str, Any]] = {
    "vq16": {"image_channels": 3, "multipliers": (1, 1, 2, 2, 4)},
    "vq8": {"image_channels": 3, "multipliers": (1, 2, 2, 4)},
    "mnist": {"image_channels": 1, "channels": 16, "multipliers": (1, 2, 2), "blocks": 1, "latent_channels": 32,
              "code_dim": 8, "vocabulary": 256, "groups": 8, "attention": False, "local": True},
}


class VQModel(ImageTokenizer):
    """Encoder, codebook and decoder.

    Args:
        image_channels: 3, or 1 for grey images.
        channels: width at full resolution.
        multipliers: width of each level in multiples of ``channels``, full resolution first; each level but the
            last halves the image.
        blocks: residual blocks per level in the encoder; the decoder has one more.
        latent_channels: width between the convolutions and the 1x1 convolution to ``code_dim``.
        code_dim: numbers per code.
        vocabulary: number of codes.
        groups: groups of every GroupNorm.
        attention: self-attention at the lowest resolution.
        local: an encoder whose codes depend on their own square of pixels alone, without attention.
        unit_codes: compare latents and codes by angle, as LlamaGen does; else by distance, as taming-transformers does.

    Raises:
        UserError: an argument out of range.
    """

    def __init__(self, *, image_channels: int = 3, channels: int = 128, multipliers: Sequence[int] = (1, 1, 2, 2, 4),
                 blocks: int = 2, latent_channels: int = 256, code_dim: int = 8, vocabulary: int = 16384,
                 groups: int = 32, attention: bool = True, local: bool = False, unit_codes: bool = True):
        options = {
            "image_channels": image_channels, "channels": channels, "multipliers": list(multipliers),
            "blocks": blocks, "latent_channels": latent_channels, "code_dim": code_dim, "vocabulary": vocabulary,
            "groups": groups, "attention": attention, "local": local, "unit_codes": unit_codes,
        }
        check_options(options)
        if local and attention:
            raise UserError("local and attention are both on, but attention looks at the whole image; switch one "
                            "off (the preset mnist has no attention)")
        super().__init__(options, len(multipliers))
        sizes = (image_channels, channels, tuple(multipliers), blocks, latent_channels, groups, attention)
        self.encoder = Encoder(*sizes, local)
        self.decoder = Decoder(*sizes)
        self.quantize = Quantizer(vocabulary, code_dim, unit_codes)
        self.quant_conv = nn.Conv2d(latent_channels, code_dim, 1)
        self.post_quant_conv = nn.Conv2d(code_dim, latent_channels, 1)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the first weights from torch's global generator.

        ============  ==========================================================
        convolutions  torch's default (uniform, Kaiming with a = sqrt 5)
        norms         weight 1, bias 0
        codes         normal, then unit length: even over the sphere they live on
        ============  ==========================================================
        """
        with torch.no_grad():
            self.quantize.embedding.weight.normal_()
            self.quantize.embedding.weight.copy_(self.quantize.codes())

    def forward(self, images: Tensor) -> tuple[Tensor, Quantised]:
        """Reconstruct: (B, image_channels, H, W) in [-1, 1] -> images of the same shape, unclamped, and the codes."""
        quantised = self.quantize(self.latents(images))
        return self.pixels(quantised.latents), quantised

    def latents(self, images: Tensor) -> Tensor:
        """Return what the quantiser sees: (B, image_channels, H, W) -> (B, code_dim, h, w), not normalised."""
        return self.quant_conv(self.encoder(images))

    def pixels(self, latents: Tensor) -> Tensor:
        """Return the images of codes laid out: (B, code_dim, h, w) -> (B, image_channels, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(latents))


def preset(name: str) -> dict[str, Any]:
    """Return a copy of a preset's constructor arguments.

    Raises:
        UserError: the name is unknown; the nearest is named.
    """
    check_choice("the tokenizer's preset", name, PRESETS)
    return dict(PRESETS[name])


def check_options(options: dict[str, Any]) -> None:
    """Raise :class:`UserError` for sizes of which no encoder and decoder can be built."""
    if options["image_channels"] not in (1, 3):
        raise UserError(f"image_channels is {options['image_channels']}; give 3, or 1 for grey images")
    for name in ("channels", "blocks", "latent_channels", "code_dim", "groups"):
        if options.get(name, 1) < 1:
            raise UserError(f"{name} is {options[name]}; give 1 or more")
    if not options["multipliers"] or min(options["multipliers"]) < 1:
        raise UserError(f"multipliers are {options['multipliers']}; give one whole number of 1 or more per level")
    for width in {options["channels"] * m for m in (1, *options["multipliers"])}:
        if width % options["groups"]:
            raise UserError(f"groups is {options['groups']}, which does not divide the level of {width} channels; "
                            "give channels that it divides")
