"""The random streams against unbounded Python integers, and pinned so that nobody changes them by accident."""

import pytest
import torch
from scipy import stats

from mutor_img.common.streams import Stream, bits, generator_seed, integers, uniform

WORD = 2**64


def splitmix(*keys):
    """SplitMix64's finaliser, once per key, as published; an unsigned 64-bit Python integer."""
    x = 0
    for key in keys:
        x = ((x ^ (key % WORD)) + 0x9E3779B97F4A7C15) % WORD
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % WORD
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % WORD
        x ^= x >> 31
    return x


KEYS = [(0, Stream.OFFSET, 0, 0), (1, Stream.ANCHOR, 360_000, 2_562_333), (-1, Stream.TOKEN, 5),
        (2**63 - 1, Stream.ORDER, 2**40, -7), (WORD - 1, Stream.LABEL, 0), (123, Stream.INIT)]


@pytest.mark.parametrize("seed, stream, keys", [(seed, stream, keys) for seed, stream, *keys in KEYS])
def test_bits_are_splitmix_applied_once_a_key(seed, stream, keys):
    expected = splitmix(seed, int(stream), *keys)
    assert int(bits(seed, stream, *keys)) % WORD == expected
    assert float(uniform(seed, stream, *keys)) == (expected >> 11) / 2**53
    assert int(integers(15, seed, stream, *keys)) == (expected >> 1) % 15
    assert generator_seed(seed, stream, *keys) == expected >> 1


def test_tensor_keys_broadcast_and_equal_scalar_keys():
    steps, samples = torch.tensor([[0], [7]]), torch.tensor([0, 3, 2**50, -1])
    drawn = bits(11, Stream.VIEW, steps, samples)
    assert drawn.shape == (2, 4)
    for i, step in enumerate([0, 7]):
        for j, sample in enumerate([0, 3, 2**50, -1]):
            assert int(drawn[i, j]) % WORD == splitmix(11, int(Stream.VIEW), step, sample)


def test_the_streams_are_pinned():
    """A change here changes every run's draws: never update these numbers to make the test pass."""
    assert int(bits(0, Stream.OFFSET, 0, 0)) % WORD == 0xD1C0270687984B37
    assert int(bits(1, Stream.ANCHOR, 2, 3, 4)) % WORD == 0xCFF9DFE5EFA3B44
    assert integers(15, 0, Stream.OFFSET, 0, torch.arange(8)).tolist() == [11, 14, 2, 3, 0, 7, 7, 5]
    pinned = [0.932206157865104, 0.7346155531152749, 0.5180072181522523]
    assert uniform(0, Stream.TOKEN, torch.arange(3)).tolist() == pinned
    assert generator_seed(0, Stream.ORDER, 1) == 8133829014772952999


def test_the_numbers_of_the_streams_are_pinned():
    names = ["OFFSET", "ANCHOR", "CLASS_DROP", "VIEW", "ORDER", "DROPOUT", "LABEL", "TOKEN", "IS_ORDER", "AUGMENT",
             "INIT", "NOISE"]
    assert {name: int(Stream[name]) for name in names} == {name: i for i, name in enumerate(names, start=1)}
    assert len({int(stream) for stream in Stream}) == len(Stream)


def test_uniform_numbers_fill_the_half_open_unit_interval():
    drawn = uniform(3, Stream.TOKEN, torch.arange(50_000))
    assert drawn.dtype == torch.float64
    assert 0 <= drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-3


def test_the_largest_uniform_number_is_below_one(monkeypatch):
    monkeypatch.setattr("mutor_img.common.streams.bits", lambda *keys: torch.tensor([-1, 0]))
    assert uniform(0, Stream.TOKEN).tolist() == [1 - 2.0**-53, 0.0]


@pytest.mark.parametrize("high", [1, 2, 15, 16384])
def test_integers_are_uniform_below_high(high):
    drawn = integers(high, 5, Stream.LABEL, torch.arange(20 * high if high > 100 else 20_000))
    counts = torch.bincount(drawn, minlength=high)
    assert len(counts) == high
    assert high == 1 or stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_every_bit_is_fair_and_neighbouring_keys_share_nothing():
    drawn = bits(0, Stream.OFFSET, torch.arange(20_000))
    columns = torch.stack([(drawn >> i) & 1 for i in range(64)], dim=1).double()
    assert (columns.mean(0) - 0.5).abs().max() < 5 * 0.5 / 20_000**0.5
    agree = (columns[1:] == columns[:-1]).double().mean(0)
    assert (agree - 0.5).abs().max() < 5 * 0.5 / 20_000**0.5


def test_key_order_key_count_and_stream_all_matter():
    draws = [bits(1, Stream.OFFSET, 2, 3), bits(1, Stream.OFFSET, 3, 2), bits(2, Stream.OFFSET, 1, 3),
             bits(1, Stream.ANCHOR, 2, 3), bits(1, Stream.OFFSET, 2), bits(1, Stream.OFFSET, 2, 3, 0)]
    assert len({int(draw) for draw in draws}) == len(draws)


def test_drawing_leaves_torch_generator_alone_and_has_no_state():
    before = torch.get_rng_state()
    assert torch.equal(uniform(1, Stream.TOKEN, torch.arange(5)), uniform(1, Stream.TOKEN, torch.arange(5)))
    assert torch.equal(before, torch.get_rng_state())
