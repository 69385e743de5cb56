"""Random numbers as pure functions of named keys: (seed, stream, step, sample, ...).

Nothing here has a state. A draw depends on its keys alone, so it is the same after a resume, on another
number of processes, on another device and in another batch. The mixing function is the finaliser of
SplitMix64 (Steele, Lea, Flood 2014) applied once per key, in wrapping 64-bit integer arithmetic, which CPUs
and GPUs do alike. Everything is vectorised and stays on the device of the keys.
"""

from __future__ import annotations

from enum import IntEnum
from functools import reduce

import torch
from torch import Tensor

_WORD = 2**64
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer, as tensors want it
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


class Stream(IntEnum):
    """One number for each purpose, so that no two purposes ever share a draw. Never renumber."""

    OFFSET = 1
    ANCHOR = 2
    CLASS_DROP = 3
    VIEW = 4
    ORDER = 5
    DROPOUT = 6
    LABEL = 7
    TOKEN = 8
    IS_ORDER = 9
    AUGMENT = 10
    INIT = 11
    NOISE = 12


def _mixed(*keys: int | Tensor) -> int | Tensor:
    """Return the 64 bits of all keys: an unsigned Python integer, or an int64 tensor if one of them is a tensor."""
    return reduce(_mix, (key if isinstance(key, Tensor) else int(key) for key in keys), 0)


def _mix(x: int | Tensor, key: int | Tensor) -> int | Tensor:
    """Return the bits after one more key."""
    if isinstance(x, int) and isinstance(key, int):
        x = ((x ^ (key % _WORD)) + _GOLDEN) % _WORD
        x = ((x ^ (x >> 30)) * _MIX_1) % _WORD
        x = ((x ^ (x >> 27)) * _MIX_2) % _WORD
        return x ^ (x >> 31)
    x, key = (k if isinstance(k, Tensor) else _signed(k) for k in (x, key))
    x = (x ^ key) + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int64, which torch only has as an arithmetic shift."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Wrap a Python integer into the signed 64-bit range."""
    return (int(value) + 2**63) % _WORD - 2**63


def bits(seed: int, stream: Stream, *keys: int | Tensor) -> Tensor:
    """Return 64 random bits for each combination of keys, as int64; keys broadcast against each other.

    Integers before the first tensor are mixed in Python: on a GPU each operation spared is a kernel spared.

    Args:
        seed: the run's seed, any 64-bit integer.
        stream: the purpose of the draw.
        keys: integers or int64 tensors (step, sample number, position, ...).
    """
    x = _mixed(seed, stream, *keys)
    return x if isinstance(x, Tensor) else torch.tensor(_signed(x))


def uniform(seed: int, stream: Stream, *keys: int | Tensor) -> Tensor:
    """Return float64 numbers uniform in [0, 1), 53 bits each, one for each combination of keys."""
    return _shift_right(bits(seed, stream, *keys), 11).to(torch.float64) * 2.0**-53


def integers(high: int, seed: int, stream: Stream, *keys: int | Tensor) -> Tensor:
    """Return int64 numbers uniform in {0 .. high - 1}; the bias of the modulo is below high / 2**63."""
    return _shift_right(bits(seed, stream, *keys), 1) % high


def generator_seed(seed: int, stream: Stream, *keys: int) -> int:
    """Return a Python integer in [0, 2**63) to seed a ``torch.Generator`` with (permutations, first weights)."""
    return _mixed(seed, stream, *keys) >> 1
