"""Which layout a path is, and its images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mutor_img.common.errors import UserError
from tokenizer.images.folder import ImageFolder, list_images, walk
from tokenizer.images.label_file import list_labelled
from tokenizer.images.parquet import find_shards, list_parquet
from tokenizer.images.source import ImageSource, read_class_list
from tokenizer.images.webdataset import find_tars, list_tars


def open_images(images: str | Path, *, labels: str | Path | None = None, classes: str | Path | None = None,
                progress: bool = False) -> ImageSource:
    """List the images at a path: class folders, Parquet or tar files, or with ``labels`` images that lie flat.

    Args:
        images: a folder, or for Parquet files also folder/split.
        labels: a file that holds the labels (``tokenizer.images.label_file``).
        classes: all classes in label order (``tokenizer.images.source.read_class_list``); unless given, those found.
        progress: show a progress bar where it takes seconds.

    Raises:
        UserError: no layout fits, or the layout's own reasons.
    """
    known = None if classes is None else read_class_list(classes)
    shards = find_shards(images)
    tars = [] if shards else find_tars(images)
    if (shards or tars) and labels is not None:
        raise UserError(f"{images}: holds {'Parquet' if shards else 'tar'} files, which hold their labels; leave "
                        "--labels out")
    if shards:
        return list_parquet(shards, known)
    if tars:
        return list_tars(tars, known, progress=progress)
    if labels is not None:
        return list_labelled(images, labels, known)
    return list_images(images, known, progress=progress)


def open_unlabelled(images: str | Path) -> ImageSource:
    """List the images at a path whose labels do not matter: as :func:`open_images`, and also those that lie flat.

    Raises:
        UserError: no layout fits.
    """
    root = Path(images)
    if not root.is_dir() or find_shards(root) or any(entry.is_dir() for entry in root.iterdir()):
        return open_images(root)
    found, left_out = walk(root)
    if not found:
        return open_images(root)  # which says what is missing
    return ImageFolder(root, ["images"], [path for path, _ in found], [size for _, size in found],
                       np.zeros(len(found), np.int64), left_out)
