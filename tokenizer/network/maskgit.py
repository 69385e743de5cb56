"""MaskGIT's VQ tokenizer (arXiv 2202.04200), which RAR, RandAR and reAR use.

It is a VQGAN (arXiv 2012.09841) without attention and, in most convolutions, without biases. Images are halved by
averaging. Where a residual block changes its width, its shortcut starts from the block's result and not from its input:
so the released weights were trained. Names of modules are those of the PyTorch weights that open-muse and 1d-tokenizer
share. Pixels are in [0, 1] inside and in [-1, 1] outside, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.network.interface import ImageTokenizer
from tokenizer.network.quantizer import Quantizer
from tokenizer.network.vq import check_options


class MaskGITModel(ImageTokenizer):
    """Encoder, codebook and decoder; for released weights, not for training.

    Args:
        image_channels: 3, or 1 for grey images.
        channels: width at full resolution.
        multipliers: width of each level in multiples of ``channels``, full resolution first; each level but the
            last halves the image.
        blocks: residual blocks per level, and in the middle.
        code_dim: numbers per code.
        vocabulary: number of codes.
        groups: groups of every GroupNorm.

    Raises:
        UserError: an argument out of range.
    """

    def __init__(self, *, image_channels: int = 3, channels: int = 128, multipliers: Sequence[int] = (1, 1, 2, 2, 4),
                 blocks: int = 2, code_dim: int = 256, vocabulary: int = 1024, groups: int = 32):
        options = {"image_channels": image_channels, "channels": channels, "multipliers": list(multipliers),
                   "blocks": blocks, "code_dim": code_dim, "vocabulary": vocabulary, "groups": groups}
        check_options(options)
        super().__init__({"architecture": "maskgit", **options}, len(multipliers))
        sizes = (image_channels, channels, tuple(multipliers), blocks, code_dim, groups)
        self.encoder = MaskGITEncoder(*sizes)
        self.decoder = MaskGITDecoder(*sizes)
        self.quantize = Quantizer(vocabulary, code_dim, unit=False)

    def latents(self, images: Tensor) -> Tensor:
        """Return what the quantiser sees: (B, image_channels, H, W) in [-1, 1] -> (B, code_dim, h, w)."""
        return self.encoder(images * 0.5 + 0.5)

    def pixels(self, latents: Tensor) -> Tensor:
        """Return the images of codes laid out: (B, code_dim, h, w) -> (B, image_channels, H, W), not clamped."""
        return self.decoder(latents) * 2 - 1


class MaskGITBlock(nn.Module):
    """Two convolutions without biases, each after GroupNorm and SiLU: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W); where the channels change, the input itself is not added."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(y) if hasattr(self, "nin_shortcut") else x)


class MaskGITLevel(nn.Module):
    """The blocks of one resolution: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, inputs: int, outputs: int, blocks: int, groups: int):
        super().__init__()
        widths = [inputs] + [outputs] * blocks
        self.block = nn.ModuleList(MaskGITBlock(a, b, groups) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        for block in self.block:
            x = block(x)
        return x


class MaskGITEncoder(nn.Module):
    """Pixels (B, image_channels, H, W) in [0, 1] -> latents (B, code_dim, H / f, W / f), f = 2 ** (levels - 1)."""

    def __init__(self, image_channels: int, channels: int, multipliers: Sequence[int], blocks: int, code_dim: int,
                 groups: int):
        super().__init__()
        widths = [channels] + [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(image_channels, channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(MaskGITLevel(a, b, blocks, groups) for a, b in pairwise(widths))
        self.mid = nn.ModuleList(MaskGITBlock(widths[-1], widths[-1], groups) for _ in range(blocks))
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], code_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, image_channels, H, W) -> (B, code_dim, H / f, W / f)."""
        x = self.conv_in(x)
        for index, level in enumerate(self.down):
            x = level(F.avg_pool2d(x, 2) if index else x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class MaskGITDecoder(nn.Module):
    """Latents (B, code_dim, h, w) -> pixels (B, image_channels, h * f, w * f); level 0 has full resolution."""

    def __init__(self, image_channels: int, channels: int, multipliers: Sequence[int], blocks: int, code_dim: int,
                 groups: int):
        super().__init__()
        widths = [channels * m for m in (*multipliers, multipliers[-1])]
        self.conv_in = nn.Conv2d(code_dim, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(MaskGITBlock(widths[-1], widths[-1], groups) for _ in range(blocks))
        self.up = nn.ModuleList(MaskGITLevel(below, own, blocks, groups) for own, below in pairwise(widths))
        for level, width in zip(self.up[1:], widths[1:]):
            level.upsample_conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, code_dim, h, w) -> (B, image_channels, h * f, w * f)."""
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample_conv"):
                x = level.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))
