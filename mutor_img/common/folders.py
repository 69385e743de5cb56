"""Folders of images, read by one rule in every command, in an order that depends on names alone.

Links to files and folders are followed. Hidden files and folders are as if they were not there: names that begin with a
dot, and what desktops and storage boxes leave behind. An image whose file is gone is listed, so that it counts as
unreadable; a folder that is gone is refused, since its class would be missing and the labels of all later ones wrong.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mutor_img.common.errors import UserError
from mutor_img.common.images import IMAGE_SUFFIXES
from mutor_img.common.splits import choose, folder_splits, is_shard, shard_splits, split_word, splits_told

_ENDINGS = ", ".join(sorted(IMAGE_SUFFIXES))
GONE = -1  # in place of bytes: nothing that can be read stands there
_LEFT_BEHIND = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
                "__pycache__", "thumbs.db", "desktop.ini"}


class Entry(NamedTuple):
    """What stands in a folder under one name."""

    name: str
    is_folder: bool
    size: int  # bytes of a file; GONE where it is no file that can be read


@dataclass(frozen=True)
class Images:
    """The image files of one folder."""

    root: Path
    files: list[str]  # paths below root, sorted class by class
    sizes: list[int]  # bytes, or GONE
    folders: list[str] | None  # class folders, sorted; None: the images lie in root itself
    places: list[int]  # of each file, its class folder's; 0 without
    left_out: list[str]  # files that are no images by their name
    split: str | None  # that of the names of files, where they were chosen by it


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder of this name is passed over everywhere."""
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def is_image(name: str) -> bool:
    """Tell whether a file is an image by its ending, in capitals or not."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def visible(folder: str | os.PathLike) -> list[Entry]:
    """Return what stands in a folder and is not hidden, sorted by name.

    Raises:
        UserError: the folder cannot be listed, or a link in it that is no image by its name leads nowhere.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(_entry(entry) for entry in entries if not is_hidden(entry.name))
    except OSError as error:
        raise UserError(f"{folder}: this folder cannot be read ({error.strerror}); repair or remove it: its images "
                        "would be missing") from None


def _entry(entry: os.DirEntry) -> Entry:
    try:
        status = entry.stat()
    except OSError as error:  # gone, a circle of links, or behind a folder that may not be entered
        if is_image(entry.name) or not entry.is_symlink():
            return Entry(entry.name, False, GONE)
        raise UserError(f"{entry.path}: a link to {os.readlink(entry.path)}, which cannot be reached "
                        f"({error.strerror}); repair or remove it: without a class folder, the labels of all later "
                        "classes would be wrong") from None
    if stat.S_ISDIR(status.st_mode):
        return Entry(entry.name, True, 0)
    return Entry(entry.name, False, status.st_size if stat.S_ISREG(status.st_mode) else GONE)


def walk(folder: str | os.PathLike, split: str | None = None) -> tuple[list[tuple[str, int]], list[str]]:
    """Return (path, bytes) of every image in a folder and its sub-folders, sorted, and the paths of other files.

    Paths are below ``folder``. Bytes are ``GONE`` for a link that leads nowhere, and for what is no plain file.

    Args:
        folder: the folder.
        split: take the images of this split only, where names of files tell it.

    Raises:
        UserError: as :func:`visible`; a link back to a folder that it lies in; sub-folders that are splits; or images
            of several splits where none is named.
    """
    found, others = _walk(Path(folder), "", ())
    found.sort()
    return [found[place] for place in _chosen(Path(folder), found, split)], sorted(others)


def _chosen(folder: Path, found: list[tuple[str, int]], split: str | None) -> list[int]:
    """Return the places of the images of one split."""
    names = [os.path.basename(path) for path, _ in found]
    return choose(folder, names, splits_told(names), split)


def _walk(folder: Path, below: str, above: tuple[tuple[int, int], ...]) -> tuple[list[tuple[str, int]], list[str]]:
    """Return what :func:`walk` does, paths beginning with ``below``; ``above`` are the folders on the way down."""
    own = _identity(folder)
    if own in above:
        raise UserError(f"{folder}: a link back to a folder that it lies in; remove it")
    entries = visible(folder)
    _refuse_splits(folder, entries)
    found, others = [], []
    for name, is_folder, size in entries:
        if is_folder:
            inner, more = _walk(folder / name, f"{below}{name}/", (*above, own))
            found += inner
            others += more
        elif is_image(name):
            found.append((below + name, size))
        else:
            others.append(below + name)
    return found, others


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _refuse_splits(folder: Path, entries: list[Entry]) -> None:
    """Raise :class:`UserError` where the sub-folders are splits (train, val) in place of classes."""
    names = [entry.name for entry in entries if entry.is_folder]
    told = [names[place] for place in sorted(chain.from_iterable(folder_splits(names).values()))]
    if told:
        raise UserError(f"{folder}: holds the splits {', '.join(told)} in place of classes; give {folder / told[0]}, "
                        "for example")


def list_classes(root: str | os.PathLike) -> list[str]:
    """Return the class folders of a folder, sorted.

    Raises:
        UserError: as :func:`visible`, or the folder above those of the splits.
    """
    entries = visible(root)
    _refuse_splits(Path(root), entries)
    return [entry.name for entry in entries if entry.is_folder]


def means_split(path: str | os.PathLike) -> bool:
    """Tell whether nothing stands at a path, but names beside it, or in folders there, make its last part a split."""
    path = Path(path)
    if path.exists() or not path.parent.is_dir():
        return False
    beside = _visible_names(path.parent)
    shards = [Path(name).stem for name in beside if is_shard(name)]
    if path.name in {**folder_splits(beside), **shard_splits(shards)}:
        return True
    inside = (name for folder in beside for name in _visible_names(path.parent / folder))
    return any(split_word(name) == path.name for name in chain(beside, inside) if is_image(name))


def _visible_names(folder: Path) -> list[str]:
    """Return what is in a folder, without hidden names; of a file, or a folder that may not be listed, nothing."""
    try:
        return [name for name in os.listdir(folder) if not is_hidden(name)]
    except OSError:
        return []


def enter_split(path: str | os.PathLike, split: str | None = None) -> tuple[Path, str | None]:
    """Return the folder that a path and a split mean, and the split where names of files in it have to tell it.

    ``data`` and ``train`` mean the sub-folder ``data/train`` (or ``data/imagenet-train``) where there is one, and else
    what the names of files in ``data`` say. So does the path ``data/train`` where nothing stands there.

    Raises:
        UserError: no such folder, or the split is not among its sub-folders though these are splits.
    """
    path = Path(path)
    if split is None and means_split(path):
        path, split = path.parent, path.name
    if not path.is_dir():
        raise UserError(f"{path}: {'a file' if path.exists() else 'no such folder'}; give the folder that holds the "
                        "images")
    if split is None:
        return path, None
    names = [entry.name for entry in visible(path) if entry.is_folder]
    told = folder_splits(names)
    if not told:
        return path, split
    chosen = choose(path, names, told, split)
    if len(chosen) > 1:
        raise UserError(f"{path}: several folders are the split {split!r}: {', '.join(names[i] for i in chosen)}; "
                        "give one of them as the path")
    return path / names[chosen[0]], None


def list_folder(root: str | os.PathLike, split: str | None = None, *, progress: bool = False) -> Images:
    """List the images of a folder: in one sub-folder for each class, at any depth below it, or in the folder itself.

    Args:
        root: the folder.
        split: take the images of this split only, where sub-folders or the names of files tell it.
        progress: show a progress bar where it takes seconds.

    Raises:
        UserError: no such folder; no image in it; images beside class folders; a class folder without images; the
            folder above those of the splits; files of several splits where none is named; or as :func:`walk`.
    """
    root, split = enter_split(root, split)
    entries = visible(root)
    _refuse_splits(root, entries)
    folders = [entry.name for entry in entries if entry.is_folder]
    loose = [(entry.name, entry.size) for entry in entries if not entry.is_folder and is_image(entry.name)]
    left_out = [entry.name for entry in entries if not entry.is_folder and not is_image(entry.name)]
    found, places, empty = [], [], []
    for place, (inner, others) in enumerate(_classes(root, folders, progress)):
        found += inner
        places += [place] * len(inner)
        left_out += others
        empty += [] if inner else [folders[place]]
    if loose and found:
        raise UserError(f"{root}: {loose[0][0]} lies outside of the class folders; put each image into its class's")
    if empty and not loose:
        raise UserError(f"{root / empty[0]}: no images in this class folder; remove it or add its images ({_ENDINGS})")
    if loose:
        found, places, folders = loose, [0] * len(loose), None
    if not found:
        raise UserError(f"{root}: no PNG images or others ({_ENDINGS}) in it, and no class folders")
    chosen = _chosen(root, found, split)
    return Images(root, [found[i][0] for i in chosen], [found[i][1] for i in chosen], folders,
                  [places[i] for i in chosen], left_out, split)


def _classes(root: Path, folders: list[str], progress: bool) -> Iterator[tuple[list[tuple[str, int]], list[str]]]:
    """Yield the images and other files of each class folder, their paths below ``root``."""
    above = (_identity(root),)
    for name in tqdm(folders, desc="listing", unit="class", delay=2, disable=not progress, leave=False):
        found, others = _walk(root / name, f"{name}/", above)
        yield sorted(found), sorted(others)
