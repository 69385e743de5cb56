"""How near reconstructions are to their images, and how well the codebook is used."""

from __future__ import annotations

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from tokenizer.network.quantizer import code_use, count_codes

WINDOW = 7  # pixels per side that SSIM compares
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, PIL's


def psnr(images: np.ndarray, reconstructions: np.ndarray) -> float:
    """Return the mean over images of the peak signal-to-noise ratio in dB; both (B, H, W, C) uint8.

    Pixels are taken in [0, 1]. An image reproduced exactly counts as 100 dB and not as infinitely many.
    """
    values = []
    for a, b in zip(images, reconstructions):
        exact = np.array_equal(a, b)
        values.append(100.0 if exact else peak_signal_noise_ratio(a / 255.0, b / 255.0, data_range=1.0))
    return float(np.mean(values))


def ssim(images: np.ndarray, reconstructions: np.ndarray) -> float:
    """Return the mean structural similarity, window 7, pixels in [0, 1] with data range 1; both (B, H, W, C) uint8.

    Some published figures use a data range of 2 on such pixels, which reads higher.
    """
    return float(np.mean([structural_similarity(a / 255.0, b / 255.0, win_size=WINDOW, channel_axis=-1, data_range=1.0)
                          for a, b in zip(images, reconstructions)]))


def sharpness(images: np.ndarray) -> float:
    """Return the mean length of the gradient of the luma, in units of 1/255 per pixel; (B, H, W, C) uint8, C 1 or 3.

    Forward differences between neighbours. Its ratio to that of the originals tells blurred reconstructions (below 1)
    from those with as much detail (1) or with invented detail (above); it does not tell right detail from wrong.
    """
    luma = images @ _LUMA if images.shape[-1] == 3 else images[..., 0].astype(np.float64)  # (B, H, W)
    down, right = np.diff(luma, axis=1)[:, :, :-1], np.diff(luma, axis=2)[:, :-1]  # (B, H - 1, W - 1) each
    return float(np.hypot(down, right).mean())


class CodeUse:
    """Counts of how often each code is used, and what they say."""

    def __init__(self, vocabulary: int):
        self.counts = torch.zeros(vocabulary, dtype=torch.int64)

    def add(self, codes: Tensor) -> None:
        """Count codes of any shape."""
        self.counts += count_codes(codes, len(self.counts)).cpu()

    def scores(self) -> dict[str, float]:
        """Return ``codes_used``, the share of the vocabulary that occurs at all, and ``perplexity``."""
        return {name: value.item() for name, value in code_use(self.counts).items()}
