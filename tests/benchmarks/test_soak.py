"""Hours of use in a loop: a round measures what it should, and what grows is seen."""

import pytest

from benchmarks import soak
from mutor_img import blocks
from mutor_img.common.errors import UserError

FLAT = dict.fromkeys(soak.LIMITS, 100.0)


def test_a_round_trains_samples_and_scores_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setitem(blocks.PRESETS, "mnist", (2, 2, 16))
    monkeypatch.setattr(soak, "UPDATES", 2)
    soak.prepare(tmp_path)
    before = set(tmp_path.rglob("*"))
    row = soak.one_round(tmp_path, 0)
    assert set(row) == set(soak.LIMITS) and min(row.values()) > 0
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", soak.LIMITS)
def test_what_grows_in_each_round_is_seen_and_what_fills_at_the_beginning_is_not(name):
    filling = [{**FLAT, name: 100.0 * min(number, 20) / 20} for number in range(1, 201)]
    assert not any(level.grew for level in soak.levels(filling).values())
    growing = [{**FLAT, name: 100.0 + number} for number in range(200)]
    assert [quantity for quantity, level in soak.levels(growing).items() if level.grew] == [name]


def test_too_few_rounds_say_nothing():
    with pytest.raises(UserError, match="29 rounds are too few"):
        soak.levels([FLAT] * 29)
