"""Means, their errors, paired differences, and which rows no interval separates from one.

Everything is over seeds. Rows of one seed share the order of the data and, in sampling, labels and random streams. So
two rows are compared by their differences seed by seed, in which what they share cancels (a paired t-test).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.stats import t as student

LEVEL = 0.95


class Interval(NamedTuple):
    """An interval of confidence for a mean.

    Attributes:
        mean, low, high: in the units of the values.
        count: how many values.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def separated(self) -> bool:
        """Whether 0 lies outside: the interval tells the sign."""
        return self.low > 0 or self.high < 0


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean, s / sqrt(n); None for a single value, which says nothing of it."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Return the interval that contains the mean with probability ``level``, were the values drawn from a normal law.

    Student's ``mean +- t(n - 1) s / sqrt(n)``; None for fewer than two values.
    """
    if len(values) < 2:
        return None
    mean, reach = fmean(values), student.ppf((1 + level) / 2, len(values) - 1) * standard_error(values)
    return Interval(mean, mean - reach, mean + reach, len(values))


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
