"""Means and intervals against scipy's own tests and printed tables."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from mutor_img.study.comparison.statistics import Interval, not_separated, paired, standard_error, t_interval

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize("count, student", [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776)])  # of printed tables
def test_an_interval_is_students_of_the_printed_tables(count, student):
    values = list(range(count))  # of variance count (count + 1) / 12
    found = t_interval(values)
    assert found.mean == (count - 1) / 2 and found.count == count
    assert (found.high - found.mean) / ((count + 1) / 12) ** 0.5 == pytest.approx(student, abs=1e-3)
    assert found.high - found.mean == pytest.approx(found.mean - found.low)


def test_an_interval_of_paired_differences_is_that_of_the_paired_t_test():
    for count in (2, 3, 5, 9):
        ours, theirs = DRAW.normal(3, 1, count), DRAW.normal(3, 1, count)
        found = t_interval(paired(dict(enumerate(ours)), dict(enumerate(theirs))))
        test = ttest_rel(ours, theirs)
        wanted = test.confidence_interval(0.95)
        assert found[:3] == pytest.approx(((ours - theirs).mean(), wanted.low, wanted.high))
        assert found.separated == (test.pvalue < 0.05)


def test_one_interval_in_twenty_misses_the_truth():
    draws = DRAW.normal(7, 2, (4000, 4))
    missed = np.mean([not low <= 7 <= high for _, low, high, _ in map(t_interval, draws.tolist())])
    assert 0.04 < missed < 0.06


def test_what_two_rows_share_at_a_seed_cancels():
    ours, theirs = {0: 1.0, 1: 2.0, 2: 4.0}, {0: 1.5, 1: 2.0, 2: 3.0}
    shifted = [{seed: value + 100 * seed for seed, value in row.items()} for row in (ours, theirs)]
    assert paired(*shifted) == pytest.approx(paired(ours, theirs)) == [-0.5, 0.0, 1.0]


def test_only_seeds_that_both_have_are_compared():
    assert paired({0: 1.0, 2: 5.0, 3: 1.0}, {2: 2.0, 1: 7.0, 0: 0.5}) == [0.5, 3.0]
    assert paired({0: 1.0}, {1: 1.0}) == []


def test_a_single_seed_says_nothing_of_the_spread():
    assert t_interval([3.0]) is None and t_interval([]) is None and standard_error([3.0]) is None


def test_equal_differences_have_an_interval_of_one_point():
    assert t_interval([0.5, 0.5, 0.5])[:3] == (0.5, 0.5, 0.5) and t_interval([0.5, 0.5]).separated
    assert not Interval(0.0, 0.0, 0.0, 2).separated  # a row that is the baseline's copy


def test_the_standard_error_falls_as_one_over_the_root_of_the_count():
    values = DRAW.normal(0, 1, 5)
    assert standard_error(values.tolist()) == pytest.approx(values.std(ddof=1) / 5**0.5)


def separated(ours, theirs) -> bool | None:
    """Tell by scipy whether a paired test separates two rows; None: too few seeds."""
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    return bool(ttest_1samp([ours[s] - theirs[s] for s in seeds], 0).pvalue < 0.05)


def test_rows_are_not_separated_where_scipy_s_paired_test_finds_nothing():
    for trial in range(20):
        rows = {f"r{i}": {seed: float(DRAW.normal(i % 3, 0.6)) for seed in range(1 if i == 5 and trial % 2 else 4)}
                for i in range(6)}
        for name in rows:
            near = [other for other in rows if other != name and separated(rows[other], rows[name]) is False]
            assert not_separated(rows, name) == near
