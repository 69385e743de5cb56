import numpy as np
import pytest

from mutor_img.common.errors import UserError
from mutor_img.metrics.subsets import choose, match


def test_a_choice_is_distinct_ascending_and_a_function_of_the_seed():
    chosen = choose(100, 30, 0).tolist()
    assert chosen == sorted(set(chosen))
    assert chosen == choose(100, 30, 0).tolist() != choose(100, 30, 1).tolist()
    assert choose(7, 7, 0).tolist() == list(range(7))


def test_matched_sides_have_the_same_number_of_every_class():
    ours, theirs = np.array([0, 0, 0, 1, 2, 2]), np.array([2, 1, 1, 0, 0])
    a, b = match(6, ours, 5, theirs, seed=0)
    assert sorted(ours[a]) == sorted(theirs[b]) == [0, 0, 1, 2]


def test_without_labels_only_the_numbers_are_matched():
    a, b = match(6, None, 4, np.zeros(4, int), seed=0)
    assert len(a) == len(b) == 4


def test_sides_without_a_common_class_are_refused():
    with pytest.raises(UserError, match="in common"):
        match(3, [0, 0, 0], 3, [1, 1, 1], seed=0)
