"""Codes that others have published, in the layouts of the programs that wrote them.

RandAR (its ``tools/extract_latent_codes.py``): ``<label>/<number>.npy``, (views, N) int64. LlamaGen (its
``extract_codes_c2i.py``): ``*_codes/<number>.npy``, (1, views, N) int64, and ``*_labels/<number>.npy``, (1,) int64.
1d-tokenizer (its ``pretokenization.py --ten_crop``): a line ``{"class_id": 0, "tokens": [...]}`` for each view, the
ten views of an image one after the other. None names its classes or its tokenizer: labels are positions in the sorted
list of class folders.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mutor_img.common.arrays import load_npy
from mutor_img.common.errors import UserError
from mutor_img.common.folders import visible
from tokenizer.images.source import Labelled, spread

_CURE = "fetch it again"
_SAMPLED = 4  # images of a list that stand for it
TEN = 10  # crops of an image: LlamaGen's, and the lines of an image in a file of JSON lines
_MOST_PROCESSES = 64  # of a run of LlamaGen's script: it may repeat as many images, less one


@dataclass(frozen=True)
class CodeSet(Labelled, ABC):
    """Codes of a list of labelled images; one sub-class per layout."""

    note: str = ""  # what a person should know before these codes are used

    @abstractmethod
    def load(self, index: int) -> np.ndarray:
        """Return what the files say of one image: (views, N) of any dtype, unless they are damaged."""

    def samples_of(self, images: slice) -> list[str]:
        """Return hashes of a few images' codes: files of codes have all the same size."""
        numbers = range(*images.indices(len(self)))
        return [hashlib.sha256(np.ascontiguousarray(self.load(numbers[i])).data).hexdigest()
                for i in spread(len(numbers), _SAMPLED)]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Views of an image, and codes per view: those of the first image."""
        first = self.load(0)
        if first.ndim != 2 or not first.size:
            raise UserError(f"{self.name(0)}: an array of shape {first.shape}; expected (views, codes)")
        return first.shape

    def read(self, index: int, vocabulary: int) -> np.ndarray:
        """Return the codes of one image, (views, N) integers.

        Raises:
            UserError: they cannot be read, are of another shape than the first image's, are no integers, or one is
                outside of the vocabulary.
        """
        codes = self.load(index)
        if codes.shape != self.shape or not np.issubdtype(codes.dtype, np.integer):
            raise UserError(f"{self.name(index)}: {codes.dtype} of shape {codes.shape}; expected integers of shape "
                            f"{self.shape}, as in {self.name(0)}")
        for code in (int(codes.min()), int(codes.max())):
            if not 0 <= code < vocabulary:
                raise UserError(f"{self.name(index)}: code {code} is outside of the tokenizer's vocabulary, 0 to "
                                f"{vocabulary - 1}; give the tokenizer that made these codes")
        return codes


class NumberedFiles(CodeSet):
    """One .npy file per image (RandAR, LlamaGen)."""

    def load(self, index: int) -> np.ndarray:
        """Return the array of one file, (views, N)."""
        codes = load_npy(self.root / self.files[index], _CURE)
        return codes[0] if codes.ndim == 3 and len(codes) == 1 else codes


class JsonLines(CodeSet):
    """``TEN`` lines of one file per image (1d-tokenizer); sizes are the bytes of these lines."""

    @property
    def path(self) -> Path:
        """The file."""
        return self.root / self.files[0].rpartition(":")[0]

    @cached_property
    def _begins(self) -> np.ndarray:
        return np.cumsum([0, *self.sizes])

    def load(self, index: int) -> np.ndarray:
        """Return the codes of one image's lines, (TEN, N)."""
        with open(self.path, "rb") as file:
            file.seek(self._begins[index])
            lines = file.read(self.sizes[index]).splitlines()
        rows = []
        for place, line in enumerate(lines):
            label, codes = parse_line(line, self.path, TEN * index + place + 1)
            if label != self.labels[index]:
                raise UserError(f"{self.path}: line {TEN * index + place + 1} has class {label}, but line "
                                f"{TEN * index + 1} has class {self.labels[index]}; expected the {TEN} crops of "
                                "each image one after the other (pretokenization.py --ten_crop)")
            rows.append(codes)
        if any(len(row) != len(rows[0]) for row in rows):
            raise UserError(f"{self.name(index)}: {sorted({len(row) for row in rows})} codes on a line; expected as "
                            "many on each")
        return np.array(rows)


def open_randar(root: Path, classes: list[str], progress: bool = False) -> CodeSet:
    """List the files of RandAR's layout, label by label and number by number.

    Raises:
        UserError: as :func:`_numbered`, or no file is there.
    """
    files, sizes, labels = [], [], []
    folders = _numbered(root, "", "RandAR's folders, one per label")
    for folder in tqdm(folders, desc="listing", unit="class", delay=2, leave=False, disable=not progress):
        found = _numbered(root / folder, ".npy", "files <number>.npy")
        files += [f"{folder}/{name}" for name in found]
        sizes += found.values()
        labels += [int(folder)] * len(found)
    if not files:
        raise UserError(f"{root}: no codes in it; give the folder that holds the folders 0, 1, … of the labels")
    codes = NumberedFiles(root, classes, files, sizes, np.array(labels, np.int64))
    _check_labels(codes)
    return codes


def open_llamagen(root: Path, classes: list[str], progress: bool = False) -> CodeSet:
    """List the files of LlamaGen's layout by their numbers, and read their labels.

    Several processes of its script share the images evenly, and fill up with the first images again: such files at the
    end are left out, with a note.

    Args:
        root: the folder that holds ``*_codes`` and ``*_labels``, or one of several ``*_codes`` in it.
        classes: all classes, in label order.

    Raises:
        UserError: a folder is missing, or a file of one of them; files do not count from 0; or a damaged label.
    """
    folder, beside = _pair(root)
    codes, labels = (_numbered(place, ".npy", "files <number>.npy") for place in (folder, beside))
    for number in range(max(len(codes), len(labels))):
        for place, found in ((folder, codes), (beside, labels)):
            if f"{number}.npy" not in found:
                raise UserError(f"{place / f'{number}.npy'}: no such file, but there are {len(codes)} files of codes "
                                f"and {len(labels)} of labels; fetch what is missing")
    names = list(codes)
    bar = tqdm(names, desc="labels", unit="image", delay=2, leave=False, disable=not progress)
    values = np.array([_label(beside / name) for name in bar], np.int64)
    repeated = _repeated(names, folder, values)
    count = len(names) - repeated
    note = f"{folder}: the last {repeated} files repeat the first ones and are left out" if repeated else ""
    found = NumberedFiles(folder, classes, names[:count], list(codes.values())[:count], values[:count], note)
    _check_labels(found)
    return found


def open_json_lines(path: Path, classes: list[str], progress: bool = False) -> CodeSet:
    """Find the lines of each image in a file of 1d-tokenizer's layout, in the order of the file.

    Raises:
        UserError: no such file, a first line that cannot be read, or lines that are not ``TEN`` per image.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the .jsonl file itself")
    sizes, labels, lines = [], [], 0
    with (open(path, "rb") as file,
          tqdm(total=path.stat().st_size, desc="listing", unit="B", unit_scale=True, delay=2, leave=False,
               disable=not progress) as bar):
        for line in file:
            if lines % TEN == 0:
                labels.append(parse_line(line, path, lines + 1)[0])
                sizes.append(0)
            sizes[-1] += len(line)
            lines += 1
            bar.update(len(line))
    if not lines or lines % TEN:
        raise UserError(f"{path}: {lines} lines; expected {TEN} for each image (pretokenization.py --ten_crop)")
    names = [f"{path.name}:{TEN * index + 1}" for index in range(len(labels))]  # the number of the first line
    found = JsonLines(path.parent, classes, names, sizes, np.array(labels, np.int64))
    _check_labels(found)
    return found


FORMATS: dict[str, Callable[[Path, list[str], bool], CodeSet]] = {
    "randar": open_randar, "llamagen": open_llamagen, "maskgit-jsonl": open_json_lines}


def parse_line(line: bytes, path: Path, number: int) -> tuple[int, list[int]]:
    """Return the label and the codes of one JSON line.

    Raises:
        UserError: the line says something else.
    """
    try:
        found = json.loads(line)
        label, codes = found["class_id"], found["tokens"]
    except (ValueError, TypeError, KeyError, RecursionError):
        label, codes = None, None
    if type(codes) is not list or not all(type(value) is int and abs(value) < 2**62 for value in (label, *codes)):
        raise UserError(f"{path}: line {number} is not of the form {{\"class_id\": 0, \"tokens\": [1, 2, …]}}; fetch "
                        "the file again")
    return label, codes


def _numbered(folder: Path, suffix: str, expected: str) -> dict[str, int]:
    """Return the bytes of each entry ``<number><suffix>`` of a folder by its name, sorted by number.

    Raises:
        UserError: no such folder, or something else is in it.
    """
    if not folder.is_dir():
        hint = "unpack it and give the folder" if folder.is_file() else "check the path"
        raise UserError(f"{folder}: {'a file' if folder.is_file() else 'no such folder'}; {hint}")
    entries = visible(folder)
    for entry in entries:
        if not re.fullmatch(rf"[0-9]{{1,12}}{re.escape(suffix)}", entry.name) or entry.is_folder != (not suffix):
            raise UserError(f"{folder / entry.name}: expected {expected} and nothing else in {folder}; move it away, "
                            "or give the right folder with --source")
    return {entry.name: entry.size for entry in sorted(entries, key=lambda entry: int(entry.name.removesuffix(suffix)))}


def _pair(root: Path) -> tuple[Path, Path]:
    """Return the folders of codes and of labels that ``root`` means."""
    found = [root] if root.name.endswith("_codes") else sorted(root.glob("*_codes"))
    if len(found) != 1:
        names = f"several ({', '.join(path.name for path in found)})" if found else "none"
        raise UserError(f"{root}: expected one folder *_codes in it, with *_labels beside; there are {names}; give the "
                        "folder *_codes itself")
    return found[0], found[0].with_name(found[0].name.removesuffix("_codes") + "_labels")


def _label(path: Path) -> int:
    array = load_npy(path, _CURE)
    if array.size != 1 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{path}: {array.dtype} of shape {array.shape}; expected one whole number, the label")
    return int(array.reshape(()))


def _repeated(names: list[str], folder: Path, labels: np.ndarray) -> int:
    """Return how many files at the end repeat the first ones, codes and labels."""
    def same(first: int, other: int) -> bool:
        return labels[first] == labels[other] and np.array_equal(*(load_npy(folder / names[i], _CURE)
                                                                   for i in (first, other)))

    most = min(_MOST_PROCESSES - 1, len(names) // 2)
    return next((count for count in range(most, 0, -1)
                 if all(same(i, len(names) - count + i) for i in range(count))), 0)


def _check_labels(codes: CodeSet) -> None:
    """Raise :class:`UserError` for a label that is none of the classes."""
    for index in np.flatnonzero((codes.labels < 0) | (codes.labels >= len(codes.classes)))[:1]:
        raise UserError(f"{codes.name(index)}: label {codes.labels[index]} is outside of the {len(codes.classes)} "
                        "classes of --classes; give the list of all classes")
