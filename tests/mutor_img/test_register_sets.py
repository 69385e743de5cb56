"""Registers whose offsets are a set that the user chooses: leaps over near tokens, or near ones alone."""

from collections import Counter

import pytest
import torch

from mutor_img import draw_registers
from mutor_img.common.errors import UserError
from mutor_img.registers import RegisterLaw, register_ids, register_targets

RASTER_15 = [down * 16 + right for down in range(4) for right in range(4) if down or right]  # d_max 4 in 2D, 16 x 16


def draw(kind, samples=40, **settings):
    return draw_registers(kind=kind, seed=3, step=5, samples=torch.arange(samples),
                          **{"grid": (16, 16), "count": None, "d_max": 4, **settings})


@pytest.mark.parametrize("settings", [{}, {"count": 80}, {"count": 80, "mixed": True}, {"every": 3, "mixed": True}])
@pytest.mark.parametrize("kind, offsets", [("1d", [1, 2, 3, 4]), ("1d", [4, 1, 3, 2]), ("2d", RASTER_15[::-1])])
def test_the_offsets_of_a_named_kind_give_its_draws_in_any_order(kind, offsets, settings):
    for named, chosen in zip(draw(kind, **settings), draw("set", offsets=offsets, **settings), strict=True):
        assert torch.equal(named, chosen)


def test_draws_are_uniform_over_the_set():
    _, offsets = draw("set", samples=3000, offsets=[3, 5, 7])
    counts = Counter(offsets[:, 0].tolist())
    assert counts.keys() == {3, 5, 7} and all(abs(n - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for n in counts.values())
    assert (offsets == offsets[:, :1]).all()  # one offset a sequence
    _, mixed = draw("set", offsets=[3, 5, 7], mixed=True)
    assert set(mixed[0].tolist()) == {3, 5, 7}


def test_there_are_as_many_places_as_the_farthest_leap_leaves():
    law = RegisterLaw("set", (4, 5), count=14, chosen=(2, 7))
    anchors, offsets = law.draw(0, 0, torch.arange(200))
    assert law.largest_count == 20 - 7 + 1 == 14 and (anchors + offsets <= 20).all()
    with pytest.raises(UserError, match=r"registers.count is 15; with offsets \[2, 7\] on a grid of 4 x 5 .* 1 and 14"):
        RegisterLaw("set", (4, 5), count=15, chosen=(2, 7))


def test_targets_and_ids_of_leaps_are_those_of_the_method():
    codes = torch.arange(1, 21)[None]  # x_i is i
    anchors, offsets = draw("set", samples=1, grid=(4, 5), offsets=[6])
    expected = [t + 6 if t + 6 <= 20 else -100 for t in range(20)]
    assert register_targets(codes, anchors, offsets)[0].tolist() == expected
    assert register_ids(anchors, offsets, 20)[0].tolist() == [min(t + 5, 19) for t in range(20)]


@pytest.mark.parametrize("settings, message", [
    ({"chosen": ()}, r"registers.offsets is \[\]; give different offsets between 1 and 20, as in \[2, 3\]"),
    ({"chosen": (0, 2)}, r"registers.offsets is \[0, 2\]"), ({"chosen": (21,)}, r"registers.offsets is \[21\]"),
    ({"chosen": (2, 2)}, r"registers.offsets is \[2, 2\]"),
    ({"chosen": (2,), "wrap": False}, "registers.wrap=false drops 2D targets"),
    ({"kind": "1d", "chosen": (2,)}, "registers.offsets are for registers.kind=set, not for 1d")])
def test_a_set_that_cannot_be_is_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        RegisterLaw(**{"kind": "set", "grid": (4, 5), **settings})
