"""Images inside tar files in WebDataset's layout: members of one key side by side, as ``a.jpg`` and ``a.cls``.

``.cls`` holds the label as a number, which does not say what it counts: ``--classes`` does.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from mutor_img.common.errors import UserError
from mutor_img.common.images import IMAGE_SUFFIXES
from tokenizer.images.source import IMAGENET, ImageSource, is_wordnet_id


@dataclass(frozen=True)
class TarImages(ImageSource):
    """The images of several tar files, one after another."""

    tars: list[Path] = field(default_factory=list)
    places: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))  # (images, 2): tar, first byte

    def open(self, index: int) -> BinaryIO:
        """Return the bytes of one image."""
        tar, offset = self.places[index].tolist()
        with open(self.tars[tar], "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(self.sizes[index]))


def find_tars(images: str | Path) -> list[Path]:
    """Return the tar files of a folder without sub-folders, sorted; none where it is something else."""
    path = Path(images)
    if not path.is_dir() or any(entry.is_dir() for entry in path.iterdir()):
        return []
    return sorted(path.glob("*.tar"))


def list_tars(tars: list[Path], classes: list[str] | None, *, progress: bool = False) -> TarImages:
    """List the images of tar files, in order. Reads every header once: minutes for ImageNet.

    Args:
        tars: the files.
        classes: all classes in label order.
        progress: show a progress bar where it takes seconds.

    Raises:
        UserError: no ``classes``, a damaged tar, an image without ``.cls``, or a label out of range.
    """
    if all(is_wordnet_id(tar.stem) for tar in tars):
        raise UserError(f"{tars[0]}: a class's tar file, as ImageNet's archive holds them; unpack each into a folder "
                        f"of its name ({tars[0].stem}/) and remove it")
    if classes is None:
        raise UserError(f"{tars[0]}: labels in tar files are numbers; name the classes in that order with --classes "
                        f"({IMAGENET}: WordNet ids sorted, from 0)")
    files, sizes, labels, places, left_out = [], [], [], [], []
    for number, tar in enumerate(tqdm(tars, desc="listing", unit="tar", delay=2, disable=not progress, leave=False)):
        images, numbers = _members(tar)
        for key, (name, offset, size) in images.items():
            if key not in numbers:
                raise UserError(f"{tar}: {name} has no {key}.cls beside it")
            files.append(f"{tar.name}:{name}")
            sizes.append(size)
            labels.append(numbers[key])
            places.append((number, offset))
        left_out += [f"{tar.name}:{key}.cls" for key in numbers if key not in images]
    if not files:
        raise UserError(f"{tars[0].parent}: no images in its tar files; expected members such as a.jpg and a.cls")
    wrong = [i for i, label in enumerate(labels) if not 0 <= label < len(classes)]
    if wrong:
        raise UserError(f"{files[wrong[0]]}: label {labels[wrong[0]]} is outside 0 to {len(classes) - 1}")
    return TarImages(tars[0].parent, classes, files, sizes, np.array(labels, np.int64), left_out, tars,
                     np.array(places, np.int64))


def _members(path: Path) -> tuple[dict[str, tuple[str, int, int]], dict[str, int]]:
    """Return by key the image (name, first byte, bytes) and the label of one tar file's members."""
    images, labels = {}, {}
    try:
        with tarfile.open(path, "r:") as tar:  # not compressed: bytes can be sought
            for member in tar:
                key, _, ending = member.name.rpartition(".")
                if member.isfile() and ending == "cls":
                    labels[key] = int(tar.extractfile(member).read())
                elif member.isfile() and f".{ending.lower()}" in IMAGE_SUFFIXES:
                    images[key] = (member.name, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: not a readable tar file without compression ({error}); fetch it again") from None
    except ValueError as error:
        raise UserError(f"{path}: {key}.cls is no number ({error})") from None
    return images, labels
