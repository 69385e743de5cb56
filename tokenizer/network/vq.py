"""The VQ tokenizer: images to a grid of codes and back.

The network is LlamaGen's (arXiv 2406.06525, section 2.1), so that its released weights load under their own names;
``PRESETS`` holds its two sizes and a small one for 32-pixel digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mutor_img.common.errors import UserError, suggest
from mutor_img.common.full_precision import full_precision
from tokenizer.network.layers import Decoder, Encoder
from tokenizer.network.quantizer import Quantised, Quantizer

# The most pixels of one pass on a GPU. VQ-16 takes 10 GiB at its worst moment for 64 images of 256 pixels per side, to
# encode as to decode (counted on fake tensors), and in proportion for more: 100 GiB for the ten crops of 64 images.
MOST_PIXELS = 64 * 256**2

PRESETS: dict[str, dict[str, Any]] = {
    "vq16": {"multipliers": (1, 1, 2, 2, 4)},
    "vq8": {"multipliers": (1, 2, 2, 4)},
    "mnist": {"image_channels": 1, "channels": 16, "multipliers": (1, 2, 2), "blocks": 1, "latent_channels": 32,
              "code_dim": 8, "vocabulary": 256, "groups": 8, "attention": False, "local": True},
}


class VQModel(nn.Module):
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

    Attributes:
        image_channels, vocabulary: as above.
        downsample: pixels per side of the square that one code stands for.
        options: the arguments, to build the same model again.
        image_size: pixels per side trained at, or None where nothing says so.
        path, hash: where the weights were read from, and the sha256 of that file; empty until loaded.

    Raises:
        UserError: an argument out of range.
    """

    def __init__(self, *, image_channels: int = 3, channels: int = 128, multipliers: Sequence[int] = (1, 1, 2, 2, 4),
                 blocks: int = 2, latent_channels: int = 256, code_dim: int = 8, vocabulary: int = 16384,
                 groups: int = 32, attention: bool = True, local: bool = False):
        super().__init__()
        self.options = {
            "image_channels": image_channels, "channels": channels, "multipliers": list(multipliers),
            "blocks": blocks, "latent_channels": latent_channels, "code_dim": code_dim, "vocabulary": vocabulary,
            "groups": groups, "attention": attention, "local": local,
        }
        _check_options(self.options)
        self.image_channels, self.vocabulary = image_channels, vocabulary
        self.downsample = 2 ** (len(multipliers) - 1)
        self.image_size: int | None = None
        self.path, self.hash = "", ""
        sizes = (image_channels, channels, tuple(multipliers), blocks, latent_channels, groups, attention)
        self.encoder = Encoder(*sizes, local)
        self.decoder = Decoder(*sizes)
        self.quantize = Quantizer(vocabulary, code_dim)
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
        return self.decoder(self.post_quant_conv(quantised.latents)), quantised

    def latents(self, images: Tensor) -> Tensor:
        """Return what the quantiser sees: (B, image_channels, H, W) -> (B, code_dim, h, w), not normalised."""
        return self.quant_conv(self.encoder(images))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the codes of images.

        Args:
            images: (B, 3 or 1, H, W) float in [-1, 1]. Grey images are repeated for an RGB tokenizer; RGB images
                for a grey tokenizer are refused (turn them grey first: which weights to use is the caller's choice).

        Returns:
            (B, h*w) int64 in raster order, on the model's device. On the CPU in fp32 an image's codes do not depend
            on the images beside it or on how many there are.

        Raises:
            UserError: another shape, dtype or range.
        """
        images = self._check_images(images)
        return self._in_passes(lambda part: self.quantize(self.latents(part)).indices, images, *images.shape[2:])

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return the images of codes.

        Args:
            codes: (B, h*w) of an integer dtype, in raster order.
            grid: (h, w); a square unless given.

        Returns:
            (B, image_channels, H, W) fp32, clamped to [-1, 1]. On the CPU in fp32 an image does not depend on its
            batch.

        Raises:
            UserError: another shape or dtype, or a code outside of the vocabulary.
        """
        codes, grid = self._check_codes(codes, grid)

        def part(rows: Tensor) -> Tensor:
            return self.decoder(self.post_quant_conv(self.quantize.lookup(rows, grid)))

        height, width = (side * self.downsample for side in grid)
        return self._in_passes(part, codes, height, width).float().clamp(-1, 1)

    def grid_for(self, image_size: int) -> tuple[int, int]:
        """Return (rows, columns) of codes for square images of ``image_size`` pixels.

        Raises:
            UserError: the size is no positive multiple of ``downsample``.
        """
        if image_size < 1 or image_size % self.downsample:
            raise UserError(f"image size {image_size} does not fit the tokenizer; give a multiple of "
                            f"{self.downsample} pixels")
        return image_size // self.downsample, image_size // self.downsample

    def _check_images(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(f"images have shape {tuple(images.shape)}; expected (B, 3 or 1, H, W)")
        for side in images.shape[2:]:
            self.grid_for(side)
        if not images.is_floating_point():
            raise UserError(f"images are {images.dtype}; expected floats in [-1, 1] (for uint8: x / 127.5 - 1)")
        if images.shape[1] == 3 and self.image_channels == 1:
            raise UserError("the tokenizer is for grey images and these have 3 channels; turn them grey first")
        if images.numel() and not bool((images.abs() <= 1.001).all()):  # bf16 and resizing round a little beyond 1
            raise UserError(f"pixels run from {float(images.min()):.4g} to {float(images.max()):.4g}; expected [-1, 1]")
        weight = self.quant_conv.weight
        return images.to(weight.device, weight.dtype).expand(-1, self.image_channels, -1, -1)

    def _check_codes(self, codes: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int]]:
        if codes.ndim != 2 or codes.is_floating_point() or codes.dtype == torch.bool:
            raise UserError(f"codes are {codes.dtype} of shape {tuple(codes.shape)}; expected integers (B, h*w)")
        side = math.isqrt(codes.shape[1])
        grid = (side, side) if grid is None else tuple(grid)
        if grid[0] * grid[1] != codes.shape[1] or not codes.shape[1]:
            raise UserError(f"{codes.shape[1]} codes per image do not fill a grid of {grid[0]} x {grid[1]}; give "
                            "the grid they were made on")
        codes = codes.to(self.quant_conv.weight.device, torch.int64)
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.vocabulary:
            raise UserError(f"codes run from {int(codes.min())} to {int(codes.max())}; the vocabulary is 0 to "
                            f"{self.vocabulary - 1}")
        return codes, grid

    def _in_passes(self, function: Callable[[Tensor], Tensor], rows: Tensor, height: int, width: int) -> Tensor:
        """Run ``function`` on rows of images of so many pixels, some rows at a time, in full single precision.

        GPUs would convolve in TF32, as torch has them do by default: codes between two near ones would change.
        """
        count = rows_at_once(rows.device, height, width)
        with full_precision():
            if not len(rows):
                return function(rows.new_zeros(1, *rows.shape[1:]))[:0]
            parts = []
            for part in rows.split(count):
                missing = count - len(part) if rows.device.type == "cpu" else 0
                padded = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part.contiguous()
                parts.append(function(padded)[: len(part)])
        return torch.cat(parts)


def rows_at_once(device: torch.device, height: int, width: int) -> int:
    """Return how many images of ``height`` x ``width`` pixels the network takes in one pass.

    On a GPU as many at most as memory is sure to hold. On the CPU always that many, padded, and what is fastest: a
    convolution may sum in another order for another batch size, and with the number of rows fixed by the image size
    alone results are the same bytes however the images are grouped.
    """
    if device.type != "cpu":
        return max(1, MOST_PIXELS // (height * width))
    side = max(height, width)
    return 64 if side <= 64 else 8 if side <= 128 else 1


def preset(name: str) -> dict[str, Any]:
    """Return a copy of a preset's constructor arguments.

    Raises:
        UserError: the name is unknown; the nearest is named.
    """
    if name not in PRESETS:
        raise UserError(f"tokenizer preset {name!r} is unknown{suggest(name, PRESETS)}")
    return dict(PRESETS[name])


def _check_options(options: dict[str, Any]) -> None:
    if options["image_channels"] not in (1, 3):
        raise UserError(f"image_channels is {options['image_channels']}; give 3, or 1 for grey images")
    for name in ("channels", "blocks", "latent_channels", "code_dim", "groups"):
        if options[name] < 1:
            raise UserError(f"{name} is {options[name]}; give 1 or more")
    if not options["multipliers"] or min(options["multipliers"]) < 1:
        raise UserError(f"multipliers are {options['multipliers']}; give one whole number of 1 or more per level")
    if options["local"] and options["attention"]:
        raise UserError("local and attention are both on, but attention looks at the whole image; switch one off")
    for width in {options["channels"] * m for m in (1, *options["multipliers"])}:
        if width % options["groups"]:
            raise UserError(f"groups is {options['groups']}, which does not divide the level of {width} channels")
