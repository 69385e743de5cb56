"""The computed break-even of drafts: sums over bytes and products that are counted by hand."""

import pytest
import torch

from benchmarks.break_even import MOST, break_even, main, seconds
from mutor_img.blocks import ModelConfig
from mutor_img.common.errors import UserError
from mutor_img.transformer import Transformer


@pytest.fixture(scope="module")
def sizes():
    with torch.device("meta"):
        return {name: Transformer(ModelConfig.preset(name)) for name in ("B", "3B")}


def test_a_pass_takes_the_time_of_its_bytes_or_of_its_products(sizes):
    """B: 12 blocks of 768, 2048 inside; 16384 codes; 256 places; an H100: 989 TFLOP/s and 3.35 TB/s."""
    weights = 12 * (4 * 768 * 768 + 3 * 768 * 2048) + 768 * 16384
    cache = 2 * 2 * 12 * 768 * 256 * 2  # guidance, keys and values, blocks, dim, places, bytes
    row = 70 * 12 * 768 + 34 * 16384
    alone = (2 * weights + cache + 2 * row) / 3.35e12
    many = 64 * 16 * 2 * weights / (0.4 * 989e12) + 64 * (cache + 16 * row) / 3.35e12
    assert seconds(sizes["B"], 1, 1, 0.4) == pytest.approx(alone)
    assert seconds(sizes["B"], 64, 8, 0.4) == pytest.approx(many)


def test_drafts_pay_up_to_the_break_even_and_not_beyond(sizes):
    for model in sizes.values():
        found = [break_even(model, 8, codes, 0.4) for codes in (1.0, 1.25, 1.5, 2.0, 8.0)]
        assert found == sorted(found) and (found[0], found[-1]) == (0, MOST)
        for codes, most in zip((1.25, 1.5, 2.0), found[1:]):
            for images, pays in ((most, True), (most + 1, False)):
                assert (codes * seconds(model, images, 1, 0.4) >= seconds(model, images, 8, 0.4)) is pays


def test_the_command_prints_a_line_per_number_of_codes_and_refuses_others(capsys):
    main(["--codes", "1.5,2"])
    table = capsys.readouterr().out.splitlines()
    assert "computed for an H100, not measured" in table[0] and [line.split()[0] for line in table[2:]] == ["1.5", "2"]
    for argv, words in ((["--codes", "9"], "--codes is 9"), (["--window", "1"], "--window is 1"),
                        (["--share", "0"], "--share is 0"), (["--codes", "1.5,x"], "--codes is '1.5,x'")):
        with pytest.raises(UserError, match=words):
            main(argv)
