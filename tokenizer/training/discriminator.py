"""A discriminator of patches, and the hinge losses of it and of what it judges.

PatchGAN: Isola et al., arXiv 1611.07004, section 3.2.2 and appendix 6.1.2; hinge: Lim and Ye, arXiv 1705.02894. In a
tokenizer: VQGAN, arXiv 2012.09841, section 3.1, and LlamaGen, arXiv 2406.06525, section 2.1.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MOST = 8  # times the first layer's channels: no layer is wider


class PatchDiscriminator(nn.Module):
    """Convolutions that give each overlapping patch of an image a logit: above 0 for a real one.

    ``layers`` strided 4x4 convolutions, each doubling the channels up to 8 times the first, one more of stride 1, and
    one to a single channel. BatchNorm after all but the first and the last (with LlamaGen's 64 channels and 3 layers
    it is their network: 2.77 million weights, patches of 70 pixels). The norms take the statistics of the images given
    and keep none: training is their only use, so that nothing depends on how often the network was called.

    Args:
        image_channels: 1 or 3.
        channels: of the first layer.
        layers: strided convolutions, at least 1.
    """

    def __init__(self, image_channels: int, channels: int = 64, layers: int = 3):
        super().__init__()
        widths = [channels * min(2**i, _MOST) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(image_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            parts += [nn.Conv2d(inputs, outputs, 4, stride=2 if index < layers else 1, padding=1, bias=False),
                      nn.BatchNorm2d(outputs, track_running_stats=False), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the first weights from torch's global generator.

        ============  ==========================
        convolutions  N(0, 0.02); torch's biases
        norms         weight N(1, 0.02), bias 0
        ============  ==========================
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Judge images (B, C, H, W) in about [-1, 1]: logits (B, 1, h, w) with h = :func:`patches` of H."""
        return self.main(images)


def patches(image_size: int, layers: int) -> int:
    """Return the logits per side for images of ``image_size`` pixels; below 1 the image is too small."""
    return image_size // 2**layers - 2


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's hinge loss, half of ``mean relu(1 - real) + mean relu(1 + fake)``.

    Args:
        real, fake: logits of images and of reconstructions, any shape.
    """
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """Return what the judged network minimises: minus the mean logit of its reconstructions."""
    return -torch.mean(fake.float())
