import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric

from mutor_img.common.errors import UserError
from mutor_img.metrics.frechet import Moments, Statistics, frechet_distance


def rows(count, dimension, seed=0):
    draws = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=draws, dtype=torch.float64)
    return torch.randn(count, dimension, generator=draws, dtype=torch.float64) @ mixing + seed


def statistics(x):
    moments = Moments(x.shape[1])
    for part in x.split(64):
        moments.update(part)
    return moments.finish()


def by_square_root(a, b):
    root = scipy.linalg.sqrtm(a.sigma.numpy() @ b.sigma.numpy())
    shift = (a.mu - b.mu).numpy()
    return shift @ shift + np.trace(a.sigma.numpy() + b.sigma.numpy() - 2 * np.real(root))


def test_distance_is_that_of_the_matrix_square_root():
    a, b = statistics(rows(200, 20, 1)), statistics(rows(300, 20, 2))
    assert frechet_distance(a, b) == pytest.approx(by_square_root(a, b), rel=1e-9)


def test_distance_is_torch_fidelitys():
    a, b = statistics(rows(90, 12, 1)), statistics(rows(80, 12, 2))
    theirs = fid_statistics_to_metric(*({"mu": s.mu.numpy(), "sigma": s.sigma.numpy()} for s in (a, b)), verbose=False)
    assert frechet_distance(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


@pytest.mark.parametrize("counts", [(7, 9), (7, 100), (100, 7)])
def test_fewer_images_than_features_are_exact(counts):
    # With S = X'X of centred, scaled rows X, tr sqrt(S1 S2) is the nuclear norm of X1 X2'.
    x, y = (rows(n, 20, seed) for seed, n in enumerate(counts))
    cx, cy = ((z - z.mean(0)).numpy() / np.sqrt(len(z) - 1) for z in (x, y))
    nuclear = scipy.linalg.svdvals(cx @ cy.T).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + (cx**2).sum() + (cy**2).sum() - 2 * nuclear
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(expected, rel=1e-9)


def test_closed_forms():
    one = statistics(rows(100, 15))
    shift = torch.arange(15, dtype=torch.float64)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-8)
    moved = Statistics(one.mu + shift, one.sigma)
    assert frechet_distance(one, moved) == pytest.approx(shift.square().sum().item(), rel=1e-9)
    scaled = Statistics(one.mu, 9 * one.sigma)
    assert frechet_distance(one, scaled) == pytest.approx(4 * one.sigma.trace().item(), rel=1e-9)


def test_rotation_and_order_change_nothing():
    x, y = rows(60, 10, 1), rows(70, 10, 2)
    turn = torch.linalg.qr(rows(10, 10, 3)).Q
    plain = frechet_distance(statistics(x), statistics(y))
    assert frechet_distance(statistics(x @ turn), statistics(y @ turn)) == pytest.approx(plain, rel=1e-9)
    assert frechet_distance(statistics(y.flip(0)), statistics(x)) == pytest.approx(plain, rel=1e-9)


def test_streamed_moments_are_those_of_numpy():
    x = rows(101, 8).float()
    moments = Moments(8)
    for part in (*x[:50].split(7), x[50:]):
        moments.update(part)
    found = moments.finish()
    np.testing.assert_allclose(found.mu.numpy(), x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.sigma.numpy(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)
    assert found.count == 101


def test_a_small_spread_about_a_large_mean_survives():
    # In single precision, or as a difference of two sums of squares, the variance of 10000 +- 0.1 drowns.
    x = (10_000 + 0.1 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))).float()
    assert statistics(x).sigma.item() == pytest.approx(x.double().var().item(), rel=1e-9)


@pytest.mark.parametrize("make", [
    lambda s: Statistics(s.mu[:-1], s.sigma[:-1, :-1]),
    lambda s: Statistics(s.mu, s.sigma[:-1]),
    lambda s: Statistics(s.mu * float("nan"), s.sigma),
    lambda s: Statistics(s.mu, s.sigma * float("inf")),
])
def test_statistics_that_cannot_be_compared_are_refused(make):
    one = statistics(rows(20, 5))
    with pytest.raises(UserError):
        frechet_distance(one, make(one))


def test_moments_refuse_another_width_and_a_single_image():
    moments = Moments(3)
    with pytest.raises(UserError):
        moments.update(torch.zeros(2, 4))
    moments.update(torch.zeros(1, 3))
    with pytest.raises(UserError, match="at least 2"):
        moments.finish()
