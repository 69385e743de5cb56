"""Means and intervals against scipy's own tests and printed tables."""

import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from scipy.stats import t as student
from scipy.stats import ttest_1samp, ttest_rel

from mutor_img.study.comparison.statistics import Interval, not_separated, paired, pooled, standard_error, t_interval


@pytest.fixture
def draw():
    """A generator of the test's own: its numbers depend on no other test."""
    return np.random.default_rng(0)


@pytest.mark.parametrize("count, student", [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776)])  # of printed tables
def test_an_interval_is_students_of_the_printed_tables(count, student):
    values = list(range(count))  # of variance count (count + 1) / 12
    found = t_interval(values)
    assert found.mean == (count - 1) / 2
    assert (found.high - found.mean) / ((count + 1) / 12) ** 0.5 == pytest.approx(student, abs=1e-3)
    assert found.high - found.mean == pytest.approx(found.mean - found.low)


def test_an_interval_of_paired_differences_is_that_of_the_paired_t_test(draw):
    for count in (2, 3, 5, 9):
        ours, theirs = draw.normal(3, 1, count), draw.normal(3, 1, count)
        found = t_interval(paired(dict(enumerate(ours)), dict(enumerate(theirs))))
        test = ttest_rel(ours, theirs)
        wanted = test.confidence_interval(0.95)
        assert found == pytest.approx(((ours - theirs).mean(), wanted.low, wanted.high))
        assert found.separated == (test.pvalue < 0.05)


def test_one_interval_in_twenty_misses_the_truth(draw):
    draws = draw.normal(7, 2, (4000, 4))
    missed = np.mean([not low <= 7 <= high for _, low, high in map(t_interval, draws.tolist())])
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
    assert t_interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5) and t_interval([0.5, 0.5]).separated
    assert not Interval(0.0, 0.0, 0.0).separated  # a row that is the baseline's copy


def test_the_standard_error_falls_as_one_over_the_root_of_the_count(draw):
    values = draw.normal(0, 1, 5)
    assert standard_error(values.tolist()) == pytest.approx(values.std(ddof=1) / 5**0.5)


def separated(ours, theirs) -> bool | None:
    """Tell by scipy whether a paired test separates two rows; None: too few seeds."""
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    return bool(ttest_1samp([ours[s] - theirs[s] for s in seeds], 0).pvalue < 0.05)


def test_rows_are_not_separated_where_scipy_s_paired_test_finds_nothing(draw):
    for trial in range(20):
        rows = {f"r{i}": {seed: float(draw.normal(i % 3, 0.6)) for seed in range(1 if i == 5 and trial % 2 else 4)}
                for i in range(6)}
        for name in rows:
            near = [other for other in rows if other != name and separated(rows[other], rows[name]) is False]
            assert not_separated(rows, name) == near


def drawn(draw: np.random.Generator, rows: int, seeds: int, missing: int = 0) -> dict[str, dict[int, float]]:
    """Draw a table of rows that are 0, 1, 2, ..., seeds far apart and noise of 0.5, without the last values of some."""
    seed_effects = draw.normal(0, 5, seeds)
    return {f"r{row}": {seed: float(row + seed_effects[seed] + draw.normal(0, 0.5))
                        for seed in range(seeds - (missing if row % 2 else 0))} for row in range(rows)}


def test_pooled_noise_of_two_rows_is_the_paired_t_test(draw):
    for seeds in (2, 3, 6):
        rows = drawn(draw, 2, seeds)
        found = pooled(rows, "r0")
        assert found.freedom == seeds - 1
        assert found.differences["r1"] == pytest.approx(t_interval(paired(rows["r1"], rows["r0"])))


def test_pooled_noise_of_a_full_table_is_that_of_the_textbook_s_sums_of_squares(draw):
    rows = drawn(draw, 6, 4)
    table = np.array([list(values.values()) for values in rows.values()])
    total = ((table - table.mean()) ** 2).sum()
    between = 4 * ((table.mean(1) - table.mean()) ** 2).sum() + 6 * ((table.mean(0) - table.mean()) ** 2).sum()
    noise = ((total - between) / 15) ** 0.5
    found = pooled(rows, "r2")
    assert found.freedom == 15 and found.noise == pytest.approx(noise)
    for row, name in enumerate(rows):
        if name != "r2":
            mean, reach = table[row].mean() - table[2].mean(), student.ppf(0.975, 15) * noise * (2 / 4) ** 0.5
            assert found.differences[name] == pytest.approx((mean, mean - reach, mean + reach))


def squares(rows: dict[str, dict[int, float]], name: str | None = None, apart: float = 0.0) -> float:
    """Return the least sum of squared residuals; with a name, where its row is ``apart`` above the first one."""
    names = list(rows)

    def cost(effects: np.ndarray) -> float:
        of_rows = dict(zip(names, effects[: len(names)], strict=True))
        if name is not None:
            of_rows[name] = of_rows[names[0]] + apart
        return sum((value - of_rows[row] - effects[len(names) + seed]) ** 2
                   for row, values in rows.items() for seed, value in values.items())
    return minimize(cost, np.zeros(len(names) + 5), tol=1e-10).fun


def test_a_pooled_interval_ends_where_the_squares_have_grown_as_the_t_test_allows(draw):
    """With values missing, too: least squares under a given difference, by a general minimiser."""
    rows = drawn(draw, 4, 5, missing=2)
    found, least = pooled(rows, "r0"), squares(rows)
    assert found.freedom == 16 - (4 + 5 - 1) and found.noise == pytest.approx((least / found.freedom) ** 0.5)
    limit = least * (1 + student.ppf(0.975, found.freedom) ** 2 / found.freedom)
    for name in ("r1", "r2"):
        mean, low, high = found.differences[name]
        ends = [brentq(lambda apart, name=name: squares(rows, name, apart) - limit, mean, mean + side)
                for side in (-5, 5)]
        assert (low, high) == pytest.approx(ends, abs=1e-4)


def test_one_pooled_interval_in_twenty_misses_the_truth(draw):
    tables = [pooled(drawn(draw, 5, 3, missing=1), "r0") for _ in range(3000)]
    missed = [not found.differences[f"r{row}"].low <= row <= found.differences[f"r{row}"].high
              for found in tables for row in (1, 4)]
    assert 0.04 < np.mean(missed) < 0.06


def test_rows_without_a_chain_of_common_seeds_are_not_compared():
    noisy = {"a": {0: 1.0, 1: 2.0}, "b": {0: 1.5, 1: 2.1}, "c": {7: 3.0, 8: 4.0}, "d": {1: 5.0}, "e": {}}
    assert set(pooled(noisy, "a").differences) == {"b", "d"}  # d by a single seed
    assert pooled({"a": {0: 1.0}, "b": {0: 2.0}, "c": {0: 7.0}}, "a") is None
