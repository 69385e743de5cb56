"""Folders of images, one sub-folder a class, listed in an order that depends on names alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mutor_img.common.errors import UserError
from mutor_img.common.images import IMAGE_SUFFIXES
from tokenizer.images.source import ImageSource, number_classes

_SPLITS = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class ImageFolder(ImageSource):
    """Image files below one folder; where no list of classes was given, a label is a place in sorted order."""

    def path(self, index: int) -> Path:
        return self.root / self.files[index]

    open = path


def list_images(root: str | Path, classes: list[str] | None = None, *, progress: bool = False) -> ImageFolder:
    """List ``root/<class>/**/<image>``. Files with other endings and hidden ones are left out.

    Args:
        root: the folder.
        classes: all classes in label order; unless given, the class folders sorted by name.
        progress: show a progress bar where it takes seconds.

    Raises:
        UserError: no such folder, images outside of class folders, a folder of splits (train, val) in place of
            classes, a class without images, or a folder that ``classes`` does not name.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give a folder with one sub-folder of images a class")
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    folders = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    loose = [entry.name for entry in entries if entry.is_file() and _is_image(entry.name)]
    if loose:
        raise UserError(f"{root}: {loose[0]} lies outside of the class folders; put each image into its class's "
                        "(tokenizer.encode also takes a file of labels: --labels)")
    if not folders:
        raise UserError(f"{root}: no class folders in it; expected one sub-folder of images a class")
    if set(folders) <= _SPLITS:
        raise UserError(f"{root}: holds {', '.join(folders)} in place of classes; give {root / folders[0]}")
    numbered = number_classes(folders, classes, root)
    files, sizes, labels, left_out = [], [], [], []
    for name in tqdm(folders, desc="listing", unit="class", delay=2, disable=not progress, leave=False):
        found, others = walk(root / name, f"{name}/")
        if not found:
            raise UserError(f"{root / name}: no images in this class folder; remove it or add its images "
                            f"({', '.join(sorted(IMAGE_SUFFIXES))})")
        files += [path for path, _ in found]
        sizes += [size for _, size in found]
        labels += [numbered.index(name)] * len(found)
        left_out += others
    left_out += [entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    return ImageFolder(root, numbered, files, sizes, np.array(labels, dtype=np.int64), left_out)


def walk(folder: Path, below: str = "") -> tuple[list[tuple[str, int]], list[str]]:
    """Return (path, bytes) of every image in ``folder`` and its sub-folders, sorted, and the paths of other files.

    Paths begin with ``below``. Hidden files and folders are in neither list.
    """
    found, others = [], []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            inner, more = walk(folder / entry.name, f"{below}{entry.name}/")
            found += inner
            others += more
        elif _is_image(entry.name):
            found.append((below + entry.name, entry.stat().st_size))
        else:
            others.append(below + entry.name)
    return sorted(found), sorted(others)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
