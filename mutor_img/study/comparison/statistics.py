"""Means, their errors, paired differences, and which rows no interval separates from one.

Everything is over seeds. Rows of one seed share the order of the data and, in sampling, labels and random streams. So
two rows are compared by their differences seed by seed, in which what they share cancels (a paired t-test). With few
seeds two rows alone say little about the noise; all rows together say more (:func:`pooled`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95


class Interval(NamedTuple):
    """An interval of confidence for a mean.

    Attributes:
        mean, low, high: in the units of the values.
    """

    mean: float
    low: float
    high: float

    @property
    def separated(self) -> bool:
        """Whether 0 lies outside: the interval tells the sign."""
        return self.low > 0 or self.high < 0


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean, s / sqrt(n); None for a single value, which says nothing of it."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def t_interval(values: Sequence[float]) -> Interval | None:
    """Return the interval that contains the mean with probability ``LEVEL``, were the values drawn from a normal law.

    Student's ``mean +- t(n - 1) s / sqrt(n)``; None for fewer than two values.
    """
    if len(values) < 2:
        return None
    mean, reach = fmean(values), student.ppf((1 + LEVEL) / 2, len(values) - 1) * standard_error(values)
    return Interval(mean, mean - reach, mean + reach)


class Pooled(NamedTuple):
    """Differences from one row, with intervals from the noise of all rows.

    Attributes:
        noise: standard deviation of what neither the row nor the seed explains, in the units of the values.
        freedom: its degrees of freedom.
        differences: of every row that seeds connect with the one, by name.
    """

    noise: float
    freedom: int
    differences: dict[str, Interval]


def pooled(rows: Mapping[str, Mapping[int, float]], name: str) -> Pooled | None:
    """Hold all rows against one, the noise of all of them taken together (analysis of randomised blocks).

    The model is ``value = row + seed + noise``, fitted by least squares, and the noise has one spread in all rows. For
    two rows that have the same seeds this is the paired t-test. More rows give more degrees of freedom, and so mostly
    narrower intervals; these are wrong for a row whose noise is unlike that of the others. Where a row lacks seeds, the
    other rows tell what these were like, so that its difference is not the mean of its pairs.

    Args:
        rows: values by seed, by row.
        name: the one that the others are held against.

    Returns:
        None if rows and seeds explain every value, as with a single seed.
    """
    names, seeds = list(rows), sorted({seed for values in rows.values() for seed in values})
    places = [(names.index(row), seeds.index(seed)) for row, values in rows.items() for seed in values]
    values = np.array([value for row in rows.values() for value in row.values()])  # (n,)
    row_of, seed_of = map(list, zip(*places))
    design = np.concatenate([np.eye(len(names))[row_of], np.eye(len(seeds))[seed_of]], axis=1)  # (n, rows + seeds)
    solve = np.linalg.pinv(design)  # (rows + seeds, n)
    freedom = len(values) - int(np.linalg.matrix_rank(design))
    if not freedom:
        return None
    noise = float(np.linalg.norm(values - design @ solve @ values)) / math.sqrt(freedom)
    differences = {}
    one = np.eye(design.shape[1])
    for row in names:
        contrast = one[names.index(row)] - one[names.index(name)]
        weights = contrast @ solve  # (n,): the difference is this sum of values
        if row != name and np.allclose(weights @ design, contrast):  # else no chain of common seeds leads to it
            mean = float(weights @ values)
            reach = float(student.ppf((1 + LEVEL) / 2, freedom) * noise * np.linalg.norm(weights))
            differences[row] = Interval(mean, mean - reach, mean + reach)
    return Pooled(noise, freedom, differences)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Return our value minus theirs for each seed that both have, by seed."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def not_separated(rows: Mapping[str, Mapping[int, float]], name: str) -> list[str]:
    """Return the other rows that have an interval for their difference from one, with 0 in it; in their order.

    This is no proof that they are equal, and does not carry over from pair to pair.

    Args:
        rows: values by seed, by row.
        name: the one that the others are held against.
    """
    found = {other: t_interval(paired(values, rows[name])) for other, values in rows.items() if other != name}
    return [other for other, interval in found.items() if interval is not None and not interval.separated]
