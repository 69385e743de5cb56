"""Shards: the Parquet or tar files of one folder, which together are one split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mutor_img.common.errors import UserError
from mutor_img.common.folders import GONE, Entry, is_image, visible
from mutor_img.common.splits import choose, shard_count, shard_splits

PARQUET, TAR = ".parquet", ".tar"
_KINDS = {PARQUET: "Parquet", TAR: "tar"}


def find_shards(folder: Path, split: str | None = None) -> list[Path]:
    """Return the Parquet or tar files in a folder, sorted; an empty list: there are none, and it is something else.

    Tar files beside sub-folders are left aside: those are classes.

    Args:
        folder: the folder.
        split: the files of this split only, as their names tell it (``train-00000-of-00294``, ``imagenet-val-007``).

    Raises:
        UserError: several splits where none is named, or one that is not there; a file missing from its numbered row;
            files of both kinds, or images beside them.
    """
    entries = visible(folder)
    kinds = {ending: [entry for entry in entries if not entry.is_folder and Path(entry.name).suffix.lower() == ending]
             for ending in _KINDS}
    if any(entry.is_folder for entry in entries):
        kinds[TAR] = []
    found = kinds[PARQUET] or kinds[TAR]
    if not found:
        return []
    _check_alone(folder, found, kinds, entries)
    stems = [Path(entry.name).stem for entry in found]
    chosen = choose(folder, [entry.name for entry in found], shard_splits(stems), split)
    _check_whole(folder, [found[i].name for i in chosen], [stems[i] for i in chosen])
    return [folder / found[i].name for i in chosen]


def _check_alone(folder: Path, found: list[Entry], kinds: dict[str, list[Entry]], entries: list[Entry]) -> None:
    """Refuse what would be read in part without a word."""
    others = [entry.name for entry in entries if not entry.is_folder and is_image(entry.name)]
    others += [entry.name for entry in kinds[TAR] if kinds[PARQUET]]
    if others:
        raise UserError(f"{folder}: holds {found[0].name} and {others[0]}; give each kind of file a folder of its own")
    for entry in found:
        if entry.size == GONE:
            raise UserError(f"{folder / entry.name}: not a plain file; replace or remove it")


def _check_whole(folder: Path, names: list[str], stems: list[str]) -> None:
    """Refuse a numbered row of shards from which one is missing, or beside which there is one without such a number."""
    counted = [shard_count(stem) for stem in stems]
    rows = Counter(shard for shard in counted if shard)
    if rows and None in counted:
        raise UserError(f"{folder}: {names[counted.index(None)]} is not one of the numbered files "
                        f"{next(iter(rows))[0]} beside it; remove it, or move it to a folder of its own")
    for (row, count), there in rows.items():
        if there != count:
            kind = _KINDS[Path(names[0]).suffix.lower()]
            raise UserError(f"{folder}: {there} {kind} files of {row}, but their names say {count:05d}; download "
                            "the missing files, or remove the extra ones")
