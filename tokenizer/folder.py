"""Folders of images, one sub-folder a class, listed in an order that depends on names alone."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mutor_img.errors import UserError
from mutor_img.images import IMAGE_SUFFIXES

_SPLITS = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class ImageFolder:
    """An image folder's listing; class index = position of the class folder in sorted order."""

    root: Path
    classes: list[str]  # names of the class folders, sorted
    files: list[str]  # paths below root with forward slashes, sorted within their class
    sizes: list[int]  # bytes of each file
    labels: np.ndarray  # (images,) int64

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        return self.root / self.files[index]

    def spread(self, count: int) -> np.ndarray:
        """Return ``count`` image numbers spread evenly over all (and so over the classes); all where count is 0."""
        return spread(len(self), count or len(self))


def list_images(root: str | Path) -> ImageFolder:
    """List ``root/<class>/**/<image>``. Other files and hidden folders are left out.

    Raises:
        UserError: no such folder, images outside of class folders, a folder of splits (train, val) in place of
            classes, or a class without images.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give a folder with one sub-folder of images a class")
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    classes = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    loose = [entry.name for entry in entries if entry.is_file() and _is_image(entry.name)]
    if loose:
        raise UserError(f"{root}: {loose[0]} lies outside of the class folders; put each image into its class's")
    if not classes:
        raise UserError(f"{root}: no class folders in it; expected one sub-folder of images a class")
    if set(classes) <= _SPLITS:
        raise UserError(f"{root}: holds {', '.join(classes)} in place of classes; give {root / classes[0]}")
    files, sizes, labels = [], [], []
    for label, name in enumerate(classes):
        found = sorted(_walk(root / name))
        if not found:
            raise UserError(f"{root / name}: no images in this class folder; remove it or add its images "
                            f"({', '.join(sorted(IMAGE_SUFFIXES))})")
        files += [f"{name}/{path}" for path, _ in found]
        sizes += [size for _, size in found]
        labels += [label] * len(found)
    return ImageFolder(root, classes, files, sizes, np.array(labels, dtype=np.int64))


def spread(total: int, count: int) -> np.ndarray:
    """Return up to ``count`` of the numbers 0 .. total - 1, evenly spread: ascending int64."""
    count = min(count, total)
    return np.arange(count) * total // max(1, count)


def class_names(classes: list[str]) -> list[str]:
    """Return names a person can read: ImageNet's words for 1000 WordNet folders, otherwise the folders' own names."""
    if len(classes) != 1000 or not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return list(classes)
    from timm.data import ImageNetInfo  # a second to import, and for ImageNet only

    info = ImageNetInfo("imagenet-1k")
    words = dict(zip(info.label_names(), info.label_descriptions()))
    return [words.get(name, name).split(",")[0] for name in classes]


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def _walk(folder: Path, below: str = "") -> list[tuple[str, int]]:
    """Return (path below ``folder``, bytes) of every image in it."""
    found = []
    for entry in os.scandir(folder):
        if entry.is_dir() and not entry.name.startswith("."):
            found += _walk(folder / entry.name, f"{below}{entry.name}/")
        elif _is_image(entry.name) and entry.is_file():
            found.append((below + entry.name, entry.stat().st_size))
    return found
