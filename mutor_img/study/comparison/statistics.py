"""Means, their errors, paired differences, and which rows no interval separates.

Everything is over seeds. Rows of one seed share the order of the data and, in sampling, labels and random streams. So
two rows are compared by their differences seed by seed, in which what they share cancels (a paired t-test).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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


def alike(rows: Mapping[str, Mapping[int, float]]) -> list[list[str]]:
    """Return the largest groups of rows of which no interval separates any two, in the order of the rows.

    A row may stand in several: "not separated" is no relation that carries over from pair to pair. Two rows with fewer
    than two seeds in common have no interval, and stand in no group together.

    Args:
        rows: values by seed, by row.
    """
    near: dict[str, set[str]] = {name: set() for name in rows}
    for name in rows:
        for other in rows:
            interval = t_interval(paired(rows[name], rows[other])) if name != other else None
            if interval is not None and not interval.separated:
                near[name].add(other)
    order = {name: place for place, name in enumerate(rows)}
    groups = [sorted(group, key=order.get) for group in _cliques(set(), set(rows), set(), near) if len(group) > 1]
    return sorted(groups, key=lambda group: [order[name] for name in group])


def _cliques(held: set[str], left: set[str], done: set[str], near: Mapping[str, set[str]]) -> Iterable[set[str]]:
    """Yield the maximal sets of which all are near each other (Bron and Kerbosch, 1973)."""
    if not left and not done:
        yield held
    for name in sorted(left):
        yield from _cliques(held | {name}, left & near[name], done & near[name], near)
        left, done = left - {name}, done | {name}
