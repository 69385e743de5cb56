import numpy as np
import pytest
import torch

from mutor_img.common.errors import UserError
from mutor_img.metrics import kernel_distance as module
from mutor_img.metrics.kernel_distance import kernel_distance


def cloud(count, dimension, seed, shift=0.0):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed)) + shift


def unbiased_mmd(x, y):
    """The plain double sum over all pairs of different images."""
    x, y = x.double().numpy(), y.double().numpy()

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    n, m = len(x), len(y)
    same_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    same_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return same_x + same_y - 2 * np.mean([[kernel(a, b) for b in y] for a in x])


def test_of_all_images_it_is_the_plain_unbiased_sum():
    x, y = cloud(12, 5, 1), cloud(12, 5, 2, 0.5)
    assert kernel_distance(x, y) == pytest.approx(unbiased_mmd(x, y), rel=1e-9)


def test_it_has_no_bias_and_sees_a_shift(monkeypatch):
    monkeypatch.setattr(module, "SUBSET_SIZE", 30)
    same = [kernel_distance(cloud(200, 8, 2 * i), cloud(200, 8, 2 * i + 1)) for i in range(8)]
    assert abs(np.mean(same)) < 3 * np.std(same) / len(same) ** 0.5 and min(same) < 0
    assert kernel_distance(cloud(200, 8, 0), cloud(200, 8, 1, 1.0)) > 20 * np.std(same)


def test_subsets_are_drawn_from_the_seed(monkeypatch):
    monkeypatch.setattr(module, "SUBSET_SIZE", 10)
    x, y = cloud(30, 4, 1), cloud(30, 4, 2)
    assert kernel_distance(x, y) == kernel_distance(x, y) != kernel_distance(x, y, seed=1)


def test_a_single_image_has_no_distance():
    with pytest.raises(UserError, match="at least 2"):
        kernel_distance(cloud(1, 4, 1), cloud(9, 4, 2))
