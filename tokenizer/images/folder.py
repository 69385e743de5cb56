"""Folders of images, one sub-folder for each class, listed in an order that depends on names alone."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mutor_img.common.errors import UserError
from mutor_img.common.folders import GONE, list_folder
from tokenizer.images.source import ImageSource, number_classes


@dataclass(frozen=True)
class ImageFolder(ImageSource):
    """Image files below one folder; where no list of classes was given, a label is a place in sorted order."""

    def path(self, index: int) -> Path:
        return self.root / self.files[index]

    def open(self, index: int) -> Path:
        """Return the path of one image, which must have the size that it had when the folder was listed."""
        path, size = self.path(index), self.sizes[index]
        with suppress(OSError):  # whoever reads it says what is wrong
            if size not in (GONE, now := path.stat().st_size):
                raise UserError(f"{path}: has {now} bytes, and had {size} when this folder was listed: it was changed "
                                "or replaced; run the same command again, once nothing changes any more")
        return path


def list_images(root: str | Path, classes: list[str] | None = None, *, split: str | None = None, flat: bool = False,
                progress: bool = False) -> ImageFolder:
    """List ``root/<class>/**/<image>`` by the rule of :mod:`mutor_img.common.folders`.

    Args:
        root: the folder.
        classes: all classes in label order; unless given, the class folders sorted by name.
        split: the split to take, where names tell several.
        flat: the images may also lie in the folder itself; they have one class then.
        progress: show a progress bar where it takes seconds.

    Raises:
        UserError: as :func:`~mutor_img.common.folders.list_folder`; images outside of class folders, unless ``flat``;
            or a folder that ``classes`` does not name.
    """
    found = list_folder(root, split, progress=progress)
    if found.folders is None and not flat:
        raise UserError(f"{found.root}: {found.files[0]} lies outside of the class folders; put each image into its "
                        "class's (tokenizer.encode also takes a file of labels: --labels)")
    folders = ["images"] if found.folders is None else found.folders
    numbered = number_classes(folders, classes, found.root)
    labels = np.array([numbered.index(name) for name in folders], np.int64)[found.places]
    return ImageFolder(found.root, numbered, found.files, found.sizes, labels, found.left_out)
