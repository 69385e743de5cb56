"""The benchmark of the decoder has a line for each layout and each number of images per pass."""

import pytest

from benchmarks.decode import main
from mutor_img.common.errors import UserError


def test_each_layout_decodes_the_same_images_with_any_number_per_pass(capsys):
    main(["--preset", "mnist", "--image-size", "8", "--per-pass", "1,3", "--rounds", "1", "--threads", "1"])
    rows = [line.rsplit(maxsplit=4) for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(layout, count) for layout, count, *_ in rows] == [
        ("plain", "1"), ("plain", "3"), ("channels last", "1"), ("channels last", "3")]
    assert all(float(rate) > 0 and float(difference) < 1e-3 for *_, rate, _, difference in rows)


def test_numbers_out_of_range_are_named():
    with pytest.raises(UserError, match="--per-pass is 0"):
        main(["--per-pass", "1,0"])
