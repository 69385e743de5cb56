"""What every layout of images on disk offers, and the classes that number its labels."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from mutor_img.common.errors import UserError, reading, suggest
from mutor_img.common.folders import list_classes
from mutor_img.common.images import read_image

IMAGENET = "imagenet-1k"  # as a class list: the 1000 WordNet ids in sorted order


@dataclass(frozen=True)
class Labelled:
    """A list of images, or of their codes, with the label of each: what a code store is made from."""

    root: Path
    classes: list[str]  # in label order
    files: list[str]  # a name for each image, unique below root
    sizes: list[int]  # bytes of the file that holds it: with the name, what tells that a file has changed
    labels: np.ndarray  # (images,) int64

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return what messages call the image of one number."""
        return str(self.root / self.files[index])

    def samples_of(self, images: slice) -> list[str]:
        """Return what tells the content of these from others with the same names and sizes; as a rule nothing can."""
        return []

    def class_names(self) -> list[str]:
        """Return names that a person can read, in label order."""
        return class_names(self.classes)


@dataclass(frozen=True)
class ImageSource(Labelled, ABC):
    """A list of labelled images in an order that depends on names alone; one sub-class per layout."""

    left_out: list[str] = field(default_factory=list)  # files below root that are no images by their name

    @abstractmethod
    def open(self, index: int) -> Path | BinaryIO:
        """Return where to read the encoded image of one number from."""

    def read(self, index: int, mode: str) -> Image.Image:
        """Return the decoded image of one number in PIL ``mode``.

        Raises:
            UserError: it is missing, is no image, or ends early.
        """
        name = self.name(index)
        with reading(name):  # a shard that is gone or damaged too
            return read_image(self.open(index), mode, name=name)

    def spread(self, count: int) -> np.ndarray:
        """Return ``count`` image numbers spread evenly over all (and so over the classes); all where count is 0."""
        return spread(len(self), count or len(self))

    def notes(self) -> list[str]:
        """Return one line for each thing that a person should know before these images are used."""
        notes = []
        if self.left_out:
            notes.append(f"{len(self.left_out)} files are no images by their name and are left out "
                         f"(first: {self.left_out[0]})")
        empty = len(self.classes) - len(np.unique(self.labels))
        if empty:
            notes.append(f"{empty} of {len(self.classes)} classes have no image")
        if self.classes and all(is_wordnet_id(name) for name in self.classes):
            words = imagenet_words()
            unknown = [name for name in self.classes if name not in words]
            if unknown:
                notes.append(f"{len(unknown)} class folders are none of {IMAGENET}'s (first: {unknown[0]})")
            elif len(self.classes) != 1000:
                notes.append(f"{len(self.classes)} of {IMAGENET}'s 1000 classes; labels are positions among these "
                             f"(--classes {IMAGENET} numbers them as in the whole set)")
        return notes


def spread(total: int, count: int) -> np.ndarray:
    """Return up to ``count`` of the numbers 0 .. total - 1, evenly spread: ascending int64."""
    count = min(count, total)
    return np.arange(count) * total // max(1, count)


def is_wordnet_id(name: str) -> bool:
    """Tell whether a class is named by a WordNet id, as ImageNet's are."""
    return re.fullmatch(r"n\d{8}", name) is not None


@cache
def imagenet_words() -> dict[str, str]:
    """Return ImageNet-1k's words by WordNet id, ids in sorted order, which is label order."""
    from timm.data import ImageNetInfo  # a second to import, and for ImageNet only

    info = ImageNetInfo(IMAGENET)
    return dict(sorted(zip(info.label_names(), info.label_descriptions())))


def class_names(classes: list[str]) -> list[str]:
    """Return ImageNet's words for its WordNet ids (the first of several), and every other name as it is."""
    if not any(is_wordnet_id(name) for name in classes):
        return list(classes)
    words = imagenet_words()
    return [words.get(name, name).split(",")[0] if is_wordnet_id(name) else name for name in classes]


def read_class_list(given: str | Path) -> list[str]:
    """Return the classes in label order that ``--classes`` names.

    Args:
        given: ``imagenet-1k``; a folder, whose sub-folders in sorted order are the classes; or a text file with
            one class per line, where anything after a WordNet id is ignored (``n01440764 tench, Tinca tinca``).

    Raises:
        UserError: nothing is there, or a class is there twice.
    """
    if str(given) == IMAGENET:
        return list(imagenet_words())
    path = Path(given)
    if path.is_dir():
        classes = list_classes(path)
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"--classes {given}: not a text file in UTF-8") from None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        firsts = [line.split()[0].rstrip(",") for line in lines]
        classes = [first if is_wordnet_id(first) else line for first, line in zip(firsts, lines)]
    else:
        raise UserError(f"--classes {given}: no such file or folder; give {IMAGENET}, a folder of class folders, or "
                        "a text file with one class per line")
    if not classes:
        raise UserError(f"--classes {given}: no classes in it")
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        raise UserError(f"--classes {given}: class {twice[0]!r} is there twice")
    return classes


def contradiction(names: list[str], given: list[str]) -> int | None:
    """Return the first label that two lists of as many classes give to different classes, or None.

    Names agree where one of their synonyms does (``tench, Tinca tinca`` and ``Tench``), unless one is that of another
    class letter for letter. Against words, a WordNet id stands for its own; as their wording differs from one source to
    the next, a few names unknown to the other list pass (``crane2``). Names that are the labels' own numbers say
    nothing.
    """
    if names == [str(label) for label in range(len(names))]:
        return None
    translated = any(map(is_wordnet_id, names)) != any(map(is_wordnet_id, given))
    words = imagenet_words() if translated else {}
    ours, theirs = ([words.get(name, name) for name in classes] for classes in (given, names))
    spoken = [[{part.strip().replace("_", " ").casefold() for part in name.split(",")} for name in side]
              for side in (ours, theirs)]
    whole, known = set(ours), set().union(*spoken[0])
    differ = [label for label, (one, other) in enumerate(zip(*spoken))
              if not one & other or (ours[label] != theirs[label] and theirs[label] in whole)]
    if translated and len(differ) <= len(names) // 50 and not any(spoken[1][label] & known for label in differ):
        return None
    return differ[0] if differ else None


def number_classes(found: Iterable[str], given: list[str] | None, where: str | Path) -> list[str]:
    """Return the classes in label order: the given ones, else the found ones sorted.

    Raises:
        UserError: a found class is none of the given ones.
    """
    found = sorted(set(found))
    if given is None:
        return found
    known = set(given)
    for name in found:
        if name not in known:
            hint = suggest(name, given) if len(given) < 50 else ""
            raise UserError(f"{where}: class {name!r} is none of the {len(given)} that --classes names{hint}")
    return given
