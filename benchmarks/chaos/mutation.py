"""Small changes at random places of a file: of bits, bytes, numbers, lengths, and of the values of a JSON text."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from random import Random
from typing import Any

# Values where something else stands: of another kind, or of no sensible size.
STRANGE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**40, 2**63, -2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), "",
    "x", "0", "../../x", "\0", "\ud800", "9" * 5000, "x" * 5000, [], {}, [[]], [-1], [0, 0], [2**40, 2**40], [None],
    ["x"], {"x": 1}, {"": {}}, [1] * 1000)
_BYTES = b"\x00\x01\x7f\x80\xff\n\"'[{(,:-09 "
_NUMBERS = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
_WORDS = (b"null", b"NaN", b"1e999", b"-1", b"99999999999999999999", b"9" * 5000, b"\xff\xfe", b"\xef\xbb\xbf",
          b"[" * 300, b"\0" * 64, b"\n", b"\r\n", b"\xd9\xa1", b"&a [*a]", b"!!int", b"${x}", b"../../../x")


def changed(content: bytes, draw: Random, others: Sequence[bytes]) -> bytes:
    """Return a file's content with a few changes, most often one; ``others`` are files of which parts may be put in."""
    data = bytearray(content)
    for _ in range(1 + min(7, int(draw.expovariate(1.0)))):
        draw.choice(_CHANGES)(data, draw, others)
    return bytes(data)


def changed_json(content: bytes, draw: Random) -> bytes:
    """Return a JSON text of which some values are strange ones, are gone, or stand under another name."""
    value = json.loads(content)
    for _ in range(1 + min(3, int(draw.expovariate(1.0)))):
        value = _with_strange(value, draw)
    return json.dumps(value).encode()


def with_png_sums(content: bytes) -> bytes:
    """Return a PNG whose pieces have the right checksums, as far as their lengths can be followed."""
    data, at = bytearray(content), 8
    while at + 12 <= len(data) and (end := at + 8 + int.from_bytes(data[at:at + 4], "big")) + 4 <= len(data):
        data[end:end + 4] = zlib.crc32(data[at + 4:end]).to_bytes(4, "big")
        at = end + 4
    return bytes(data)


def _with_strange(value: Any, draw: Random) -> Any:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    items = list(inner)
    if not items or draw.random() < 0.05:
        return deepcopy(draw.choice(STRANGE))  # it may be changed in its turn
    key, inner = draw.choice(items)
    act = draw.random()
    if act < 0.1:
        del value[key]
    elif act < 0.2 and isinstance(value, dict):
        value[draw.choice((f"{key}x", "", *value))] = value.pop(key)
    elif act < 0.2:
        value.insert(key, inner)
    else:
        value[key] = _with_strange(inner, draw)
    return value


def _flip(data: bytearray, draw: Random, _: Sequence[bytes]) -> None:
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _put_byte(data: bytearray, draw: Random, _: Sequence[bytes]) -> None:
    if data:
        data[draw.randrange(len(data))] = draw.choice(_BYTES)


def _put_number(data: bytearray, draw: Random, _: Sequence[bytes]) -> None:
    size = draw.choice((1, 2, 4, 8))
    if len(data) >= size:
        at, number = draw.randrange(len(data) - size + 1), draw.choice(_NUMBERS) % 2**(8 * size)
        data[at:at + size] = number.to_bytes(size, draw.choice(("little", "big")))


def _add(data: bytearray, draw: Random, _: Sequence[bytes]) -> None:
    """Add a little to a number that stands in a few bytes: sizes and counts that are almost right."""
    form, size = draw.choice((("<H", 2), (">H", 2), ("<I", 4), (">I", 4)))
    if len(data) >= size:
        at = draw.randrange(len(data) - size + 1)
        number = struct.unpack_from(form, data, at)[0] + draw.randrange(-8, 9)
        struct.pack_into(form, data, at, number % 2**(8 * size))


def _cut(data: bytearray, draw: Random, _: Sequence[bytes]) -> None:
    del data[draw.randrange(len(data) + 1):]


def _drop(data: bytearray, draw: Random, _: Sequence[bytes]) -> None:
    at = draw.randrange(len(data) + 1)
    del data[at:at + draw.choice((1, 2, 4, 16, 100))]


def _copy(data: bytearray, draw: Random, _: Sequence[bytes]) -> None:
    at, to = draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)
    data[to:to] = data[at:at + draw.choice((1, 4, 16, 100))]


def _put_word(data: bytearray, draw: Random, _: Sequence[bytes]) -> None:
    at = draw.randrange(len(data) + 1)
    data[at:at + draw.choice((0, 1, 4))] = draw.choice(_WORDS)


def _splice(data: bytearray, draw: Random, others: Sequence[bytes]) -> None:
    """Put the end of another file in place of this one's."""
    other = draw.choice(others)
    at = draw.randrange(min(len(data), len(other)) + 1)
    data[at:] = other[at:]


_CHANGES: tuple[Callable[[bytearray, Random, Sequence[bytes]], None], ...] = (
    _flip, _flip, _put_byte, _put_byte, _put_number, _put_number, _add, _cut, _drop, _copy, _put_word, _put_word,
    _splice)
