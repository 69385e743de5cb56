"""Which layout a path is, and its images."""

from __future__ import annotations

from pathlib import Path

from mutor_img.common.errors import UserError
from mutor_img.common.folders import enter_split
from tokenizer.images.folder import list_images
from tokenizer.images.label_file import list_labelled
from tokenizer.images.parquet import list_parquet
from tokenizer.images.shards import PARQUET, find_shards
from tokenizer.images.source import ImageSource, read_class_list
from tokenizer.images.webdataset import list_tars


def open_images(images: str | Path, *, labels: str | Path | None = None, classes: str | Path | None = None,
                split: str | None = None, progress: bool = False) -> ImageSource:
    """List the images at a path: class folders, Parquet or tar files, or with ``labels`` images that lie flat.

    Args:
        images: a folder; folder/split where the names in the folder tell splits.
        labels: a file that holds the labels (``tokenizer.images.label_file``).
        classes: all classes in label order (``tokenizer.images.source.read_class_list``); unless given, those found.
        split: the split to take, where names tell several; the same as the path folder/split.
        progress: show a progress bar where it takes seconds.

    Raises:
        UserError: no layout fits, several splits where none is named, or the layout's own reasons.
    """
    known = None if classes is None else read_class_list(classes)
    folder, split = enter_split(images, split)
    shards = find_shards(folder, split)
    if shards and labels is not None:
        raise UserError(f"{folder}: holds {shards[0].name}, which holds its labels; leave --labels out")
    if shards:
        return _list_shards(shards, known, progress=progress)
    if labels is not None:
        return list_labelled(folder, labels, known, split=split)
    return list_images(folder, known, split=split, progress=progress)


def open_unlabelled(images: str | Path, *, split: str | None = None) -> ImageSource:
    """List the images at a path whose labels do not matter: as :func:`open_images`, and also those that lie flat.

    Raises:
        UserError: no layout fits, or several splits where none is named.
    """
    folder, split = enter_split(images, split)
    shards = find_shards(folder, split)
    if shards:
        return _list_shards(shards, None, labelled=False)
    return list_images(folder, split=split, flat=True)


def _list_shards(shards: list[Path], classes: list[str] | None, *, labelled: bool = True,
                 progress: bool = False) -> ImageSource:
    if shards[0].suffix.lower() == PARQUET:
        return list_parquet(shards, classes, labelled=labelled)
    return list_tars(shards, classes, labelled=labelled, progress=progress)
