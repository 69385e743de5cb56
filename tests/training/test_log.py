"""Curves: a long history is thinned without losing its peaks, and no name is read as a formula."""

import numpy as np
import pytest

from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.training.log import RunLog, thinned


@pytest.mark.parametrize(("count", "most"), [(9, 4), (2001, 2000), (100_000, 2000), (1000, 7)])
def test_a_thinned_curve_keeps_its_ends_its_order_and_its_peaks(count, most):
    values = np.random.default_rng(count).standard_normal(count)
    points = [(int(step), float(value)) for step, value in zip(range(10, 10 + count), values)]
    kept = thinned(points, most)
    assert len(kept) <= most and kept == sorted(set(kept)) and set(kept) <= set(points)
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert {max(points, key=lambda p: p[1]), min(points, key=lambda p: p[1])} <= set(kept)


def test_every_part_of_a_long_curve_keeps_its_own_peak():
    points = [(step, float(step % 1000 == 500)) for step in range(10_000)]
    assert sum(value for _, value in thinned(points, 100)) == 10


def test_a_short_curve_stays_as_it_is():
    points = [(1, 2.0), (2, 1.0)]
    assert thinned(points) == points


def test_a_run_folder_with_dollar_signs_has_its_curve_drawn(tmp_path, curves):
    config = GeneratorConfig(run_dir=str(tmp_path / "$\\frac$"))
    log = RunLog(config, 0)
    log.write(1, {"loss": 1.0})
    assert log.draw(("loss",)).stat().st_size > 1000
    log.close()


def test_a_resumed_run_keeps_the_row_of_an_update_that_was_skipped(tmp_path, curves):
    config = GeneratorConfig(run_dir=str(tmp_path / "run"))
    log = RunLog(config, 0)
    for step, values in ((1, {"samples": 4}), (2, {"skipped": 1}), (2, {"val_next_token": 3.0})):
        log.write(step, values)
    log.close()
    again = RunLog(config, 2, evaluated=False)  # the evaluation after update 2 was cut short, and is done again
    again.close()
    assert again.rows == [{"step": 1, "samples": 4}, {"step": 2, "skipped": 1}]
