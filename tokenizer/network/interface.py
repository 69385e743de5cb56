"""What every tokenizer offers, whatever its network: images to a grid of codes and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mutor_img.common.errors import UserError
from mutor_img.common.full_precision import full_precision
from mutor_img.common.hub import HubModel
from tokenizer.network.quantizer import Quantizer

# The most pixels of one pass on a GPU. VQ-16 takes 10 GiB at its worst moment for 64 images of 256 pixels per side, to
# encode as to decode (counted on fake tensors), and in proportion for more: 100 GiB for the ten crops of 64 images.
MOST_PIXELS = 64 * 256**2
LUMA = 0.299, 0.587, 0.114  # of red, green and blue in grey: ITU-R BT.601, as Pillow has it


class ImageTokenizer(HubModel, nn.Module, ABC):
    """A network that turns images into grids of codes and back; one sub-class per family of networks.

    Args:
        options: the sub-class's arguments, by which the same network is built again.
        levels: resolutions of the network; each but the last halves the image.

    Attributes:
        options: as above.
        quantize: the codebook, which the sub-class makes.
        image_channels: 3, or 1 for grey images.
        vocabulary: number of codes.
        downsample: pixels per side of the square that one code stands for.
        image_size: pixels per side trained at, or None where nothing says so.
        path, hash: where the weights were read from, and the sha256 of that file; empty until loaded.
    """

    loader = "tokenizer.loading", "load_tokenizer"
    quantize: Quantizer

    def __init__(self, options: dict[str, Any], levels: int):
        super().__init__()
        self.options = options
        self.image_channels, self.vocabulary = options["image_channels"], options["vocabulary"]
        self.downsample = 2 ** (levels - 1)
        self.image_size: int | None = None
        self.path, self.hash = "", ""

    @abstractmethod
    def latents(self, images: Tensor) -> Tensor:
        """Return what the quantiser sees: (B, image_channels, H, W) in [-1, 1] -> (B, code_dim, h, w)."""

    @abstractmethod
    def pixels(self, latents: Tensor) -> Tensor:
        """Return the images of codes laid out: (B, code_dim, h, w) -> (B, image_channels, H, W), not yet clamped."""

    @property
    def stride(self) -> int:
        """``downsample`` under the name that is usual elsewhere."""
        return self.downsample

    @property
    def codebook(self) -> Tensor:
        """The codes as they are decoded, (vocabulary, code_dim) fp32."""
        return self.quantize.codes()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.quantize.embedding.weight.device

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the codes of images.

        Args:
            images: (B, 3 or 1, H, W) float in [-1, 1]. Grey images are repeated for an RGB tokenizer, RGB images
                turned grey for a grey one.

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
            return self.pixels(self.quantize.lookup(rows, grid))

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
        if images.numel() and not bool((images.abs() <= 1.001).all()):  # bf16 and resizing round a little beyond 1
            raise UserError(f"pixels run from {float(images.min()):.4g} to {float(images.max()):.4g}; expected [-1, 1]")
        images = images.to(self.device, self.quantize.embedding.weight.dtype)
        if images.shape[1] == 3 and self.image_channels == 1:
            red, green, blue = images.split(1, dim=1)  # (B, 1, H, W) each
            return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
        return images.expand(-1, self.image_channels, -1, -1)

    def _check_codes(self, codes: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int]]:
        if codes.ndim != 2 or codes.is_floating_point() or codes.dtype == torch.bool:
            raise UserError(f"codes are {codes.dtype} of shape {tuple(codes.shape)}; expected integers (B, h*w)")
        side = math.isqrt(codes.shape[1])
        grid = (side, side) if grid is None else tuple(grid)
        if grid[0] * grid[1] != codes.shape[1] or not codes.shape[1]:
            raise UserError(f"{codes.shape[1]} codes per image do not fill a grid of {grid[0]} x {grid[1]}; give "
                            "the grid they were made on")
        codes = codes.to(self.device, torch.int64)
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
