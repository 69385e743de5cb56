"""Images inside tar files in WebDataset's layout: members of one key side by side, as ``a.jpg`` and ``a.cls``.

``.cls`` holds the label as a number, which does not say what it counts: ``--classes`` does.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from mutor_img.common.errors import UserError, reading
from mutor_img.common.files import check_stamp, stamp
from mutor_img.common.folders import is_hidden, is_image
from tokenizer.images.source import IMAGENET, ImageSource, is_wordnet_id

_DIGITS = 100  # bytes of a label that are read


@dataclass(frozen=True)
class TarImages(ImageSource):
    """The images of several tar files, one after another."""

    tars: list[Path] = field(default_factory=list)
    places: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))  # (images, 2): tar, first byte
    stamps: list[tuple[int, int]] = field(default_factory=list)  # of each tar file, when it was listed
    keys_twice: list[str] = field(default_factory=list)  # images whose key an earlier tar file has too

    def open(self, index: int) -> BinaryIO:
        """Return the bytes of one image."""
        return io.BytesIO(self.content(index))

    def content(self, index: int) -> bytes:
        """Return the bytes of one image."""
        tar, offset = self.places[index].tolist()
        check_stamp(self.tars[tar], self.stamps[tar])  # in another file, another image would stand at this place
        with open(self.tars[tar], "rb") as file:
            file.seek(offset)
            return file.read(self.sizes[index])

    def notes(self) -> list[str]:
        """Return what every layout notes, and keys that several tar files use."""
        notes = super().notes()
        if self.keys_twice:
            notes.append(f"{len(self.keys_twice)} images have a key that an earlier tar file uses for another image; "
                         f"all are taken (first: {self.keys_twice[0]})")
        return notes


def list_tars(tars: list[Path], classes: list[str] | None, *, labelled: bool = True,
              progress: bool = False) -> TarImages:
    """List the images of tar files, in order. Reads every header once: minutes for ImageNet.

    Args:
        tars: the files.
        classes: all classes in label order.
        labelled: False: labels do not matter, none need be there, and all are 0.
        progress: show a progress bar where it takes seconds.

    Raises:
        UserError: no ``classes``, a damaged tar, an image without ``.cls`` or with a label out of range, a key that
            stands twice in one tar file, or an image that stands in two of them.
    """
    if all(is_wordnet_id(tar.stem) for tar in tars):
        raise UserError(f"{tars[0]}: the tar file of one class, as in ImageNet's archive; unpack each such file into "
                        f"a folder with its name ({tars[0].stem}/) and remove it")
    if labelled and classes is None:
        raise UserError(f"{tars[0]}: labels in tar files are numbers; name the classes in label order with --classes "
                        f"({IMAGENET}: WordNet ids sorted, from 0)")
    stamps = [stamp(tar) for tar in tars]
    files, sizes, labels, places, left_out = [], [], [], [], []
    for number, tar in enumerate(tqdm(tars, desc="listing", unit="tar", delay=2, disable=not progress, leave=False)):
        images, numbers = _members(tar, labelled)
        for key, (name, offset, size) in images.items():
            if labelled and key not in numbers:
                raise UserError(f"{tar}: {name} has no {key}.cls beside it")
            files.append(f"{tar.name}:{name}")
            sizes.append(size)
            labels.append(numbers[key] if labelled else 0)
            places.append((number, offset))
        left_out += [f"{tar.name}:{key}.cls" for key in numbers if key not in images]
    if not files:
        raise UserError(f"{tars[0].parent}: no images in its tar files; expected members such as a.jpg and a.cls")
    classes = classes if labelled else ["images"]
    wrong = [i for i, label in enumerate(labels) if not 0 <= label < len(classes)]
    if wrong:
        raise UserError(f"{tars[0].parent / files[wrong[0]]}: label {labels[wrong[0]]} is outside 0 to "
                        f"{len(classes) - 1}")
    found = TarImages(tars[0].parent, classes, files, sizes, np.array(labels, np.int64), left_out, tars,
                      np.array(places, np.int64), stamps)
    return replace(found, keys_twice=_keys_twice(found))


def _keys_twice(found: TarImages) -> list[str]:
    """Return the images whose key an earlier tar file has too, for another image: some writers count anew in each.

    Raises:
        UserError: an image that an earlier tar file has too, byte for byte, under the same key.
    """
    keys: set[str] = set()
    alike: dict[tuple[str, int], list[int]] = {}  # by key and bytes
    twice = []
    for index, file in enumerate(found.files):
        key = file.partition(":")[2].rpartition(".")[0]
        earlier = alike.setdefault((key, found.sizes[index]), [])
        for other in earlier:
            if found.content(other) == found.content(index):
                raise UserError(f"{found.root}: {file} is the same as {found.files[other]}, byte for byte; remove "
                                "one of the two, or the image counts twice")
        earlier.append(index)
        if key in keys:
            twice.append(file)
        keys.add(key)
    return twice


def _members(path: Path, labelled: bool) -> tuple[dict[str, tuple[str, int, int]], dict[str, int]]:
    """Return by key the image (name, first byte, bytes) and the label of one tar file's members."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    with (reading(path, kind="tar file without compression", cure="fetch it again"),
          tarfile.open(path, "r:") as tar):  # not compressed: bytes can be sought
        for member in tar:
            key, _, ending = member.name.rpartition(".")
            if member.isdir() or any(is_hidden(part) for part in member.name.split("/") if part != "."):
                continue
            if ending.lower() == "cls":
                _refuse_strange(member, path)
                _refuse_second(key, member.name, f"{key}.cls", labels, path)
                labels[key] = _number(tar.extractfile(member).read(_DIGITS), member.name, path) if labelled else 0
            elif is_image(member.name):
                _refuse_strange(member, path)
                _refuse_second(key, member.name, images.get(key, ("",))[0], images, path)
                images[key] = (member.name, member.offset_data, member.size)
        _check_end(tar, path)
    return images, labels


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """Refuse what tarfile passes over without a word: all after a damaged header, or after a first archive's end."""
    with open(path, "rb") as file:
        file.seek(tar.offset)
        while part := file.read(2**20):
            if part.strip(b"\0"):
                raise UserError(f"{path}: holds more after its last readable member (byte {tar.offset}): a damaged "
                                "file, or several tar files joined; download or pack it again")


def _refuse_strange(member: tarfile.TarInfo, path: Path) -> None:
    if not member.isfile() or member.issparse():
        raise UserError(f"{path}: {member.name} in it is not a plain file but a link, a device or a file with holes; "
                        "pack the file itself (tar --dereference --hard-dereference, and without --sparse)")


def _refuse_second(key: str, name: str, first: str, seen: Collection[str], path: Path) -> None:
    if key in seen:
        raise UserError(f"{path}: {name} is a second file with the key {key!r}, after {first}; remove one of them, "
                        "or give it a key of its own")


def _number(content: bytes, name: str, path: Path) -> int:
    try:
        return int(content)
    except ValueError as error:
        raise UserError(f"{path}: {name} is not a number ({error})") from None
