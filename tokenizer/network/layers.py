"""The convolutional encoder and decoder of LlamaGen's tokenizer (VQGAN's, arXiv 2012.09841).

Names of modules are those of the released weights: a file's keys say where each layer stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two convolutions, each after GroupNorm and SiLU, around a shortcut: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, inputs: int, outputs: int, groups: int, kernel: int = 3):
        super().__init__()
        self.norm1 = _norm(inputs, groups)
        self.conv1 = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        self.norm2 = _norm(outputs, groups)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel, padding=kernel // 2)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W); the shortcut is a 1x1 convolution where the channels change."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SelfAttention(nn.Module):
    """One head of attention over all positions, around a shortcut: (B, C, H, W) -> the same."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape; memory grows with (H * W) ** 2 where no fused kernel is at hand."""
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))  # (B, 1, H*W, C)
        y = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H*W, C), scaled by C ** -0.5
        return x + self.proj_out(y.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve height and width with a strided convolution; the padding is on the right and at the bottom only."""

    def __init__(self, channels: int, kernel: int = 3):
        super().__init__()
        self.padding = (0, kernel - 2) * 2  # none where each output sees its own 2 x 2 inputs
        self.conv = nn.Conv2d(channels, channels, kernel, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Double height and width by repeating pixels, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution: residual blocks, attention after each where asked for, then a resampling."""

    def __init__(self, inputs: int, outputs: int, blocks: int, groups: int, attention: bool, kernel: int = 3):
        super().__init__()
        widths = [inputs] + [outputs] * blocks
        self.res = nn.ModuleList(ResidualBlock(a, b, groups, kernel) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(SelfAttention(outputs, groups) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W'), H' being half or twice H where the level resamples."""
        for index, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    """Pixels (B, image_channels, H, W) -> latents (B, latent_channels, H / f, W / f), f = 2 ** (levels - 1).

    A latent of a ``local`` encoder depends on its own square of f x f pixels alone, so that equal squares get equal
    codes: it has no norms (their statistics are the whole image's), no middle, 1x1 convolutions, and 2x2 ones to halve.
    """

    def __init__(self, image_channels: int, channels: int, multipliers: Sequence[int], blocks: int,
                 latent_channels: int, groups: int, attention: bool, local: bool):
        super().__init__()
        groups, kernel, halving = (0, 1, 2) if local else (groups, 3, 3)
        widths = [channels] + [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(image_channels, channels, kernel, padding=kernel // 2)
        self.conv_blocks = nn.ModuleList()
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            lowest = index == len(multipliers) - 1
            level = Level(inputs, outputs, blocks, groups, attention and lowest, kernel)
            if not lowest:
                level.downsample = Downsample(outputs, halving)
            self.conv_blocks.append(level)
        self.mid = nn.Identity() if local else _middle(widths[-1], groups, attention)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], latent_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, image_channels, H, W) in [-1, 1] -> (B, latent_channels, H / f, W / f)."""
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w) -> pixels (B, image_channels, h * f, w * f); levels in execution order."""

    def __init__(self, image_channels: int, channels: int, multipliers: Sequence[int], blocks: int,
                 latent_channels: int, groups: int, attention: bool):
        super().__init__()
        widths = [channels * m for m in (multipliers[-1], *reversed(multipliers))]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], groups, attention)
        self.conv_blocks = nn.ModuleList()
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            level = Level(inputs, outputs, blocks + 1, groups, attention and index == 0)
            if index < len(multipliers) - 1:
                level.upsample = Upsample(outputs)
            self.conv_blocks.append(level)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, latent_channels, h, w) -> (B, image_channels, h * f, w * f), not clamped."""
        x = self.mid(self.conv_in(x))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def _norm(channels: int, groups: int) -> nn.Module:
    return nn.GroupNorm(groups, channels, eps=1e-6) if groups else nn.Identity()


def _middle(channels: int, groups: int, attention: bool) -> nn.Sequential:
    between = SelfAttention(channels, groups) if attention else nn.Identity()
    return nn.Sequential(ResidualBlock(channels, channels, groups), between, ResidualBlock(channels, channels, groups))
