"""PSNR and SSIM against their definitions, and code usage by counting."""

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter

from tokenizer.measures import CodeUse, psnr, sharpness, ssim


def pair(channels):
    generator = np.random.default_rng(1)
    a = generator.integers(0, 256, (3, 20, 24, channels), dtype=np.uint8)
    noise = generator.normal(0, 20, a.shape)
    return a, np.clip(a + noise, 0, 255).astype(np.uint8)


def test_psnr_is_the_mean_over_images_in_decibels():
    a, b = pair(3)
    errors = ((a.astype(float) - b) / 255) ** 2
    assert psnr(a, b) == pytest.approx(np.mean([10 * np.log10(1 / error.mean()) for error in errors]))
    assert psnr(a, a) == 100.0


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_its_definition_with_data_range_one(channels):
    a, b = pair(channels)
    values, unbiased = [], 49 / 48
    for x, y in zip(a / 255.0, b / 255.0):
        for channel in range(channels):
            u, v = x[..., channel], y[..., channel]
            mean_u, mean_v = uniform_filter(u, 7), uniform_filter(v, 7)
            var_u = unbiased * (uniform_filter(u * u, 7) - mean_u**2)
            var_v = unbiased * (uniform_filter(v * v, 7) - mean_v**2)
            both = unbiased * (uniform_filter(u * v, 7) - mean_u * mean_v)
            top = (2 * mean_u * mean_v + 0.01**2) * (2 * both + 0.03**2)
            values.append((top / ((mean_u**2 + mean_v**2 + 0.01**2) * (var_u + var_v + 0.03**2)))[3:-3, 3:-3].mean())
    assert ssim(a, b) == pytest.approx(np.mean(values))


def test_code_use_is_a_share_and_a_perplexity():
    use = CodeUse(8)
    use.add(torch.tensor([[0, 1], [0, 1]]))
    use.add(torch.tensor([3, 3, 4, 4]))
    assert use.scores() == {"codes_used": 0.5, "perplexity": pytest.approx(4.0)}


def test_sharpness_is_the_slope_of_a_ramp_and_falls_under_a_blur():
    rows, columns = np.mgrid[:10, :12]
    ramp = np.repeat((3 * rows + 4 * columns).astype(np.uint8)[None, :, :, None], 3, axis=3)
    assert sharpness(ramp) == pytest.approx(5.0)
    assert sharpness(ramp[..., :1]) == pytest.approx(5.0) and sharpness(ramp * 0) == 0
    noise, _ = pair(3)
    blurred = np.stack([uniform_filter(image, (3, 3, 1)) for image in noise])
    assert sharpness(blurred) < 0.5 * sharpness(noise)
    green = noise * np.array([0, 1, 0], np.uint8)
    assert sharpness(green) == pytest.approx(0.587 * sharpness(noise[..., 1:2]))
