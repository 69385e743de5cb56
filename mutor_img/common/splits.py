"""Splits that names tell: ``train`` and ``val`` as folders, in the names of shards, or in those of image files.

Two splits read as one set are trained on and scored together, and nothing shows it. So where names tell several, one
of them has to be named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mutor_img.common.errors import UserError, suggest

SHARD_SUFFIXES = (".parquet", ".tar")
_WORD = re.compile(r"(?<![a-z])(?:train(?:ing|set|val)?|val(?:id|idation|set)?|mini[-_]?val|test(?:ing|set)?|dev|"
                   r"eval(?:uation)?|hold[-_]?out|held[-_]?out)(?![a-z])")
_QUICK = re.compile(r"train|val|test|dev|eval|hold|held", re.IGNORECASE)  # a million names take a second less
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")  # imagenetTrain, trainA
_DIGITS = re.compile(r"\d+")
# 00012, or 00012-of-00294, or the latter and a hash, at the end of a shard's name
_NUMBER = re.compile(r"[-_.]?(?P<number>\d+)(?:[-_]of[-_](?P<count>\d+)(?:-[0-9a-f]{8,})?)?$")


def is_shard(name: str) -> bool:
    """Tell whether a file is a shard by its ending: a Parquet or a tar file."""
    return os.path.splitext(name)[1].lower() in SHARD_SUFFIXES


def split_word(name: str) -> str | None:
    """Return the split that a name tells, in lower case (the last word for one in it), or None."""
    words = _WORD.findall(_CAMEL.sub("_", name).lower())
    return words[-1] if words else None


def splits_told(names: Iterable[str]) -> dict[str, list[int]]:
    """Return the places of names that differ in their split alone, as train_1 and val_2 do, by split.

    Numbers are not looked at. Names that are one word each for a split (a single folder ``train`` too) count as well,
    and others do not: beside ``bullet_train``, a folder ``test_tube`` is a class.
    """
    names, alike = list(names), {}
    for place, name in enumerate(names):
        word = split_word(name) if _QUICK.search(name) else None
        if word is not None:
            before, _, after = _CAMEL.sub("_", name).lower().rpartition(word)
            pattern = _DIGITS.sub("0", f"{before}*{after}")
            alike.setdefault(pattern, {}).setdefault(word, []).append(place)
    found: dict[str, list[int]] = {}
    for splits in alike.values():
        if len(splits) > 1:
            for word, places in splits.items():
                found.setdefault(word, []).extend(places)
    return {word: sorted(places) for word, places in sorted(found.items())}


def folder_splits(names: Sequence[str]) -> dict[str, list[int]]:
    """Return the places of sub-folders that are splits, by split: as :func:`splits_told`, or all of them words for one.

    A single folder ``train`` is no class, since nothing stands beside it.
    """
    words = [split_word(name) for name in names]
    if names and all(word == name.lower() for word, name in zip(words, names)):
        return {word: [place] for place, word in enumerate(words)}
    return splits_told(names)


def shard_splits(stems: Sequence[str]) -> dict[str, list[int]]:
    """Return the places of shards by split, from their names without ending; empty where these tell none.

    A name without a word for a split belongs to one called by the name before its number, where others have such a
    word, or where names say how many there are (``extra-00000-of-00007``).
    """
    numbers = [_NUMBER.search(stem) for stem in stems]
    before = [stem[: match.start()] if match else stem for stem, match in zip(stems, numbers)]
    words = [split_word(name) for name in before]
    if not any(words) and not any(match and match["count"] for match in numbers):
        return {}
    found: dict[str, list[int]] = {}
    for place, (word, name) in enumerate(zip(words, before)):
        found.setdefault(word or name, []).append(place)
    return found


def shard_count(stem: str) -> tuple[str, int] | None:
    """Return the name before a shard's number and how many there are, where its name says so, else None."""
    match = _NUMBER.search(stem)
    return (stem[: match.start()], int(match["count"])) if match and match["count"] else None


def choose(where: Path, names: Sequence[str], told: dict[str, list[int]], split: str | None) -> list[int]:
    """Return the places of the names that are meant: those of ``split``, or all where names tell one split at most.

    Args:
        where: the folder, for messages.
        names: what stands in it.
        told: places by split, as the functions above return them.
        split: the one that was asked for, or None.

    Raises:
        UserError: several splits and none asked for, or one that is not there.
    """
    if split is None:
        if len(told) < 2:
            return list(range(len(names)))
        examples = ", ".join(names[places[0]] for places in list(told.values())[:3])
        raise UserError(f"{where}: holds the splits {', '.join(told)} (by their names: {examples}); give "
                        f"{where / next(iter(told))}, for example, or --split {next(iter(told))}")
    if split not in told:
        hint = suggest(split, told) if told else "; no names in it tell splits, so leave --split out"
        raise UserError(f"{where}: there is no split {split!r} in it{hint}")
    return told[split]
