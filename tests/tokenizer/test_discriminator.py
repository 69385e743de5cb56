"""The discriminator against convolutions and norms written out in numpy, and its losses against their formulas."""

import numpy as np
import pytest
import torch

from tokenizer.training.discriminator import PatchDiscriminator, discriminator_loss, generator_loss, patches


def convolve(x, weight, bias, stride):
    """A 4x4 convolution with one pixel of zeros around, product by product: (B, C, H, W) float64."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows, columns = ((side - 4) // stride + 1 for side in x.shape[2:])
    out = np.zeros((len(x), len(weight), rows, columns))
    for i in range(rows):
        for j in range(columns):
            window = x[:, :, i * stride: i * stride + 4, j * stride: j * stride + 4]
            out[:, :, i, j] = np.tensordot(window, weight, ([1, 2, 3], [1, 2, 3]))
    return out if bias is None else out + bias[:, None, None]


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


@pytest.mark.parametrize("layers, size", [(1, 8), (2, 13)])
def test_logits_are_convolutions_and_norms_of_the_images_given(layers, size):
    torch.manual_seed(0)
    network = PatchDiscriminator(3, channels=4, layers=layers)
    images = torch.randn(3, 3, size, size)
    weights = [w.detach().double().numpy() for w in network.parameters()]
    x = leaky(convolve(images.double().numpy(), weights[0], weights[1], 2))
    for layer in range(1, layers + 1):
        kernel, gain, shift = weights[3 * layer - 1: 3 * layer + 2]
        x = convolve(x, kernel, None, 2 if layer < layers else 1)
        x = (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
        x = leaky(x * gain[:, None, None] + shift[:, None, None])
    x = convolve(x, weights[-2], weights[-1], 1)
    assert x.shape == (3, 1, patches(size, layers), patches(size, layers))
    np.testing.assert_allclose(network(images).detach().numpy(), x, atol=1e-5)


def test_llamagens_sizes_are_its_network():
    network = PatchDiscriminator(3)
    assert sum(weight.numel() for weight in network.parameters()) == 2_765_633
    assert [m.out_channels for m in network.main if isinstance(m, torch.nn.Conv2d)] == [64, 128, 256, 512, 1]


def test_the_network_keeps_no_statistics():
    network = PatchDiscriminator(1, 4, 1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images = torch.randn(2, 1, 8, 8)
    first = network(images)
    network(torch.randn(2, 1, 8, 8) + 9)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert torch.equal(network(images), first) and torch.equal(network.eval()(images), first)


def test_hinge_losses_stop_at_the_margin():
    real, fake = torch.tensor([[-1.0, 0.5], [1.0, 3.0]]), torch.tensor([[-3.0, -1.0], [0.0, 2.0]])
    assert float(discriminator_loss(real, fake)) == 0.5 * ((2 + 0.5) / 4 + (1 + 3) / 4)
    assert float(generator_loss(fake)) == 0.5
