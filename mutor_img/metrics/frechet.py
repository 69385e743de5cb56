"""Frechet distance between two sets of features, from moments gathered in one pass.

Source: Heusel et al. 2017 (FID); Nash et al. 2021 (sFID is the same distance over spatial features).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor

from mutor_img.common.errors import UserError


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set of features.

    ``mu`` is (D,) float64, ``sigma`` (D, D) float64 with the N - 1 denominator, ``count`` the number of images
    behind them (None where a file does not say).
    """

    mu: Tensor
    sigma: Tensor
    count: int | None = None


class Moments:
    """Running float64 mean and scatter (the sum of outer products about the mean) of features.

    Batches are joined by the rule of Chan, Golub and LeVeque (1979), which never subtracts two large sums. float32
    products would be off by 3e-7 relative.
    """

    def __init__(self, dimension: int):
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)  # (D,)
        self.scatter = torch.zeros(dimension, dimension, dtype=torch.float64)  # (D, D)

    def update(self, features: Tensor) -> None:
        """Add a (B, D) batch of any float dtype, on any device.

        Raises:
            UserError: the batch has another number of features.
        """
        dimension = self.mean.shape[0]
        if features.ndim != 2 or features.shape[1] != dimension:
            raise UserError(f"features have shape {tuple(features.shape)}; these moments take (B, {dimension})")
        batch = features.detach().to("cpu", torch.float64)
        if len(batch):
            mean, total = batch.mean(0), self.count + len(batch)
            delta = mean - self.mean
            self.scatter.addmm_((batch - mean).T, batch - mean)
            self.scatter.addr_(delta, delta, alpha=self.count * len(batch) / total)
            self.mean += delta * (len(batch) / total)
            self.count = total

    def finish(self) -> Statistics:
        """Return the statistics of everything added.

        Raises:
            UserError: fewer than two images, which have no covariance.
        """
        if self.count < 2:
            raise UserError(f"{self.count} image(s) have no covariance; give at least 2")
        sigma = self.scatter / (self.count - 1)
        return Statistics(self.mean.clone(), (sigma + sigma.T) / 2, self.count)


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Return ``|mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2))``, in squared feature units, never below 0.

    With S = R R', the trace of sqrt(S1 S2) is the sum of sqrt(eigvalsh(R1' S2 R1)). R is that of the set of lower
    rank, with as many columns as the rank: so fewer images than features leave no eigenvalues of pure rounding
    error, whose roots would be 1e-8 of the scale each. 2048 x 2048 takes about 1.5 s of one core.

    Raises:
        UserError: the statistics hold NaN or infinity, or differ in their number of features.
    """
    for name, one in (("first", first), ("second", second)):
        size = one.mu.shape[0]
        if one.mu.ndim != 1 or one.sigma.shape != (size, size):
            raise UserError(f"the {name} statistics are no mean and covariance: mu has shape {tuple(one.mu.shape)}, "
                            f"sigma {tuple(one.sigma.shape)}")
        if not (torch.isfinite(one.mu).all() and torch.isfinite(one.sigma).all()):
            raise UserError(f"the {name} statistics hold NaN or infinity; look at the images and at the weights")
    if first.mu.shape != second.mu.shape:
        raise UserError(f"the statistics have {first.mu.shape[0]} and {second.mu.shape[0]} features; "
                        "both must come from one network")
    mu_1, mu_2 = first.mu.double(), second.mu.double()
    sigma_1, sigma_2 = first.sigma.double(), second.sigma.double()
    with _one_thread():
        factor, other = _factor(sigma_1), sigma_2
        if factor.shape[1] < len(factor) or torch.linalg.cholesky_ex(sigma_2).info:
            factor, other = min(((factor, sigma_2), (_factor(sigma_2), sigma_1)), key=lambda pair: pair[0].shape[1])
        values = torch.linalg.eigvalsh(factor.T @ other @ factor)  # (r,)
    roots = values.clamp(min=0).sqrt().sum()
    distance = (mu_1 - mu_2).square().sum() + sigma_1.trace() + sigma_2.trace() - 2 * roots
    return max(0.0, float(distance))


@contextmanager
def _one_thread():
    """Eigenvalues are found in a chain of small steps: threads gain nothing, and on a busy machine cost tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _factor(sigma: Tensor) -> Tensor:
    """Return R (D, r) with R R' = sigma, r being the numerical rank."""
    lower, failed = torch.linalg.cholesky_ex(sigma)
    if not failed:
        return lower
    # With pivots it stops at the rank: D r^2 in place of D^3, and what is below rounding is no part of it.
    lower, order, rank, _ = dpstrf(sigma.numpy(), lower=1)
    factor = torch.zeros(len(sigma), rank, dtype=sigma.dtype)
    factor[torch.from_numpy(order).long() - 1] = torch.from_numpy(lower).tril()[:, :rank]
    return factor
