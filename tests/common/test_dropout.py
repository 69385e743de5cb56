"""Masks of dropout: against Python's integers, as random as they should be, and the same however they are computed."""

import math

import pytest
import torch
from scipy import stats

from mutor_img.common.dropout import dropout, kept, mask_keys, row_keys
from mutor_img.common.streams import Stream, bits


def wrapped(x):
    """A Python integer as 32 bits with a sign hold it."""
    return (x + 2**31) % 2**32 - 2**31


def hashed(first, second, place):
    """lowbias32 without its last shift, its shifts with sign, and the second key between its multiplications."""
    x = wrapped(place + first)
    x = wrapped((x ^ x >> 16) * 0x7FEB352D) ^ second
    return wrapped((x ^ x >> 15) * 0x846CA68B)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.99])
def test_a_mask_is_the_hash_of_keys_and_place_below_the_rate(rate):
    keys = mask_keys(-3, 10**6, torch.tensor([5, 2**40]), 3)
    assert keys.shape == (3, 2, 2) and keys.dtype == torch.int32
    for key in keys:
        mask = kept(row_keys(key, 7, 5), 5, rate)
        expected = [[(hashed(*pair, place) + 2**31) / 2**32 >= rate for place in range(35)] for pair in key.tolist()]
        assert mask.flatten(1).tolist() == expected


def test_keys_are_the_halves_of_the_streams_bits():
    keys = mask_keys(7, 3, torch.tensor([5, 11]), 4)
    for place in range(4):
        for row, sample in enumerate((5, 11)):
            drawn = int(bits(7, Stream.DROPOUT, 3, sample, place))
            assert keys[place, row].tolist() == [wrapped(drawn), drawn >> 32]


def test_the_masks_are_pinned():
    """A change here changes every run with dropout: never update these numbers to make the test pass."""
    mask = kept(row_keys(mask_keys(0, 0, torch.arange(2), 1)[0], 2, 24), 24, 0.5)
    assert ["".join(map(str, row)) for row in mask.flatten(1).int().tolist()] == [
        "111110010111011111101010111101010001110111001110", "111010111100101101101010101101101011010100110101"]


def masks(rate, seed=0, step=0):
    """Return what is dropped of 8 sequences at 4 places, (4, 8, 256, 192) of 0 and 1."""
    return (~kept(row_keys(mask_keys(seed, step, torch.arange(8), 4), 256, 192), 192, rate)).float()


def deviation(one, two, rate):
    """Return by how many standard deviations two masks agree too often."""
    share, both = rate**2, (one * two).sum().item()
    return abs(both - one.numel() * share) / math.sqrt(one.numel() * share * (1 - share))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_a_mask_is_independent_of_its_neighbours_in_every_direction(rate):
    mask, flat = masks(rate), masks(rate).flatten(2)
    pairs = {"steps": (mask, masks(rate, step=1)), "seeds": (mask, masks(rate, seed=1)),
             "samples": (mask[:, 1:], mask[:, :-1]), "places": (mask[1:], mask[:-1])}
    pairs |= {f"{lag} channels": (mask[..., lag:], mask[..., :-lag]) for lag in (1, 2, 3, 8, 32, 64, 128)}
    pairs |= {f"{lag} positions": (mask[..., lag:, :], mask[..., :-lag, :]) for lag in (1, 2, 4, 16, 64)}
    pairs |= {f"bit {bit}": (flat[..., :2**15], flat[..., torch.arange(2**15) ^ 2**bit]) for bit in range(15)}
    for name, pair in pairs.items():
        twice = math.sqrt(2) if "bit" in name else 1.0  # there each pair is counted twice
        assert deviation(*pair, rate) < 4.5 * twice, name


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_as_many_are_dropped_as_chance_would_drop_in_all_in_each_row_and_in_each_channel(rate):
    mask = masks(rate)
    for counts, size in ((mask.sum((-1, -2)), 256 * 192), (mask.sum(-1), 192), (mask.sum(-2), 256)):
        squares = (counts - size * rate).square().sum().item() / (size * rate * (1 - rate))
        assert 1e-4 < stats.chi2.sf(squares, counts.numel()) < 1 - 1e-4
    patterns = (mask.view(-1, 8) * 2**torch.arange(8)).sum(-1).long()
    ones = torch.tensor([number.bit_count() for number in range(256)])
    expected = len(patterns) * rate**ones * (1 - rate) ** (8 - ones)
    often = expected > 5
    squares = ((patterns.bincount(minlength=256) - expected).square() / expected)[often].sum().item()
    assert stats.chi2.sf(squares, int(often.sum()) - 1) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_dropped_is_zero_and_the_rest_scaled_and_so_are_the_gradients(dtype, whole):
    x = torch.ones(64, 5, 7, dtype=dtype, requires_grad=True)
    keys = row_keys(mask_keys(0, 0, torch.arange(64), 1)[0], 5, 7)
    out = dropout(x, keys, 0.25, whole)
    out.sum().backward()
    mask = kept(keys[:, :1], 1, 0.25).expand(-1, 5, 7) if whole else kept(keys, 7, 0.25)
    assert out.dtype == dtype and torch.equal(out, torch.where(mask, 1 / 0.75, 0.0).to(dtype))
    assert torch.equal(x.grad, out) and 0.5 < mask.float().mean() < 0.9


def test_without_keys_or_a_rate_nothing_is_done():
    x = torch.ones(2, 3, 4)
    assert dropout(x, None, 0.5) is x and dropout(x, torch.zeros(2, 3, 2, dtype=torch.int32), 0.0) is x


def test_compiled_masks_are_those_of_the_eager_ones_forward_and_backward():
    """At a rate of 0.5 a compiler that took no account of wrapping could read the last comparison as one of signs."""
    x, keys = torch.randn(3, 5, 37, requires_grad=True), row_keys(mask_keys(0, 0, torch.arange(3), 1)[0], 5, 37)
    compiled = torch.compile(dropout, dynamic=False, fullgraph=True)
    outs = [function(x, keys, 0.5) for function in (compiled, dropout)]
    assert torch.equal(*outs) and torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in outs))
