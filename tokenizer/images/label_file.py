"""Images that lie flat in one folder, with a file that holds their labels, as ImageNet's validation images do.

The file has one line per image: its name and its label, by comma (LOC_val_solution.csv, whose boxes are ignored, and
any other two-column CSV) or by white space (``ILSVRC2012_val_00000001.JPEG n01751748``); or labels alone, in the order
of the file names. A label is a class's name (a WordNet id), or its number in the list that ``--classes`` gives: a
number alone does not say which list it counts in. ImageNet's own development kit counts from 1 in another order.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np

from mutor_img.common.errors import UserError
from mutor_img.common.folders import walk
from tokenizer.images.folder import ImageFolder
from tokenizer.images.source import IMAGENET, number_classes

_VALIDATION = re.compile(r"ILSVRC2012_val_\d{8}")
# The kit's ILSVRC2012_validation_ground_truth.txt: its first and last lines.
_KIT = {f"ILSVRC2012_val_{number:08d}": label for number, label in zip(
    (1, 2, 3, 4, 5, 49996, 49997, 49998, 49999, 50000), (490, 361, 171, 822, 297, 10, 495, 128, 848, 186))}


def list_labelled(root: str | Path, labels: str | Path, classes: list[str] | None = None, *,
                  split: str | None = None) -> ImageFolder:
    """List the images below ``root``, in sorted order, with labels from a file.

    Args:
        root: the folder.
        labels: the file.
        classes: all classes in label order; unless given, the labels that stand in the file, sorted.
        split: the split to take, where names of images tell several.

    Raises:
        UserError: an image without a label, a label without an image, an unknown class, numbers without ``classes``
            or in the order of ImageNet's development kit, or an image in the folder of another class.
    """
    root, labels = Path(root), Path(labels)
    found, left_out = walk(root, split)
    if not found:
        raise UserError(f"{root}: no images in it")
    files = [path for path, _ in found]
    stems = [Path(path).stem for path in files]
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise UserError(f"{root}: two images are named {twice[0]!r}, so {labels.name} does not say which one it means")
    rows = _read_rows(labels)
    words = _labels_of(stems, rows, root, labels)
    numbered, numbers = _numbers(words, classes, labels)
    _refuse_kit(stems, words, len(rows[0][1]) == 1, labels)
    _refuse_other_folders(files, [numbered[number] for number in numbers], root, labels)
    return ImageFolder(root, numbered, files, [size for _, size in found], np.array(numbers, dtype=np.int64),
                       [name for name in left_out if root / name != labels])


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Return (line number, one or two fields) of every line that is not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"--labels {path}: no such file; check the path") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserError(f"--labels {path}: not a text file") from None
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = next(csv.reader([line])) if "," in line else line.split(None, 1)
        except csv.Error as error:
            raise UserError(f"--labels {path}: line {number} is not a line of a CSV file ({error})") from None
        fields = [field.strip() for field in fields]
        if len(fields) > 2 or (rows and len(fields) != len(rows[0][1])):
            raise UserError(f"--labels {path}: line {number} has {len(fields)} fields; expected a name and a label on "
                            "every line, or labels alone")
        if not all(fields):
            raise UserError(f"--labels {path}: line {number} has an empty name or label; fill it in, or remove it")
        rows.append((number, fields))
    if not rows:
        raise UserError(f"--labels {path}: empty")
    return rows


def _labels_of(stems: list[str], rows: list[tuple[int, list[str]]], root: Path, path: Path) -> list[str]:
    """Return the label, as it stands in the file, of each image."""
    if len(rows[0][1]) == 1:
        if len(rows) != len(stems):
            raise UserError(f"--labels {path}: {len(rows)} labels for the {len(stems)} images in {root}; without names "
                            "there must be one per file, in the order of the file names")
        return [fields[0] for _, fields in rows]
    known, labels = set(stems), {}
    if Path(rows[0][1][0]).stem not in known and len(rows) > 1 and Path(rows[1][1][0]).stem in known:
        rows = rows[1:]  # a header
    for number, (name, label) in rows:
        stem = Path(name).stem
        if stem not in known:
            raise UserError(f"--labels {path}: line {number} names {name!r}, but there is no such image in {root}")
        if stem in labels:
            raise UserError(f"--labels {path}: line {number} names {name!r} a second time")
        labels[stem] = _without_boxes(label, path, number)
    missing = [stem for stem in stems if stem not in labels]
    if missing:
        raise UserError(f"--labels {path}: {len(missing)} of {len(stems)} images in {root} have no line "
                        f"(first: {missing[0]})")
    return [labels[stem] for stem in stems]


def _refuse_kit(stems: list[str], words: list[str], alone: bool, path: Path) -> None:
    """Refuse the numbers of ImageNet's development kit, which count from 1 in an order that is none of ours.

    Its file is the one with numbers alone in the order of the validation images. Beside names they are known by those
    of the first and the last images.
    """
    if not all(word.isdecimal() for word in words) or not all(map(_VALIDATION.fullmatch, stems)):
        return
    shown = [(word, _KIT[stem]) for stem, word in zip(stems, words) if stem in _KIT]
    if alone or (shown and all(word == str(number) for word, number in shown)):
        raise UserError(f"--labels {path}: these seem to be the numbers of ImageNet's development kit, which count "
                        f"from 1 in their own order ({stems[0]} is {words[0]}); use a file with WordNet ids, such as "
                        "LOC_val_solution.csv")


def _refuse_other_folders(files: list[str], labels: list[str], root: Path, path: Path) -> None:
    """Refuse a label that contradicts the class folder that its image lies in."""
    classes = set(labels)
    for file, label in zip(files, labels):
        folder = file.split("/")[0]
        if folder != file and folder != label and folder in classes:
            raise UserError(f"--labels {path}: gives class {label!r} to {root / file}, which lies in the folder of "
                            f"class {folder!r}; leave --labels out, or correct it")


def _without_boxes(label: str, path: Path, number: int) -> str:
    """Return the class of a label, which may be followed by boxes: ``n01751748 0 0 499 272 n01751748 3 …``."""
    words = label.split()
    if len(words) % 5 or not all(word.isdecimal() for word in words[1:5]):
        return label
    if len(set(words[::5])) > 1:
        raise UserError(f"--labels {path}: line {number} names two classes, {' and '.join(sorted(set(words[::5])))}")
    return words[0]


def _numbers(words: list[str], classes: list[str] | None, path: Path) -> tuple[list[str], list[int]]:
    """Return the classes in label order, and the labels as numbers.

    Raises:
        UserError: labels that can be read as names and as numbers, and mean other classes as the one than as the other.
    """
    known, decimal = set(classes or ()), all(word.isdecimal() for word in words)
    names = known.issuperset(words)
    wrong = {word: word in known for word in words  # in order; perhaps of more digits than int() takes
             if decimal and classes and (len(word) > 18 or int(word) >= len(classes))}
    if decimal and classes and not (names and wrong):  # they may be numbers
        other = next((word for word in words if word in known and word not in wrong and classes[int(word)] != word),
                     None)
        if other is not None:
            raise UserError(f"--labels {path}: label {other} may be the class named {other!r}, or the class with "
                            f"number {other}, counted from 0, which is named {classes[int(other)]!r}; rename the "
                            f"classes, to c{other} for example, here and in --classes")
    if names or not decimal:
        numbered = number_classes(words, classes, f"--labels {path}")
        place = {name: index for index, name in enumerate(numbered)}
        return numbered, [place[word] for word in words]
    if classes is None:
        raise UserError(f"--labels {path}: its labels are numbers, and nothing says which classes they mean; name the "
                        f"classes in label order with --classes ({IMAGENET}: WordNet ids sorted, from 0)")
    if wrong:
        stranger = min(wrong, key=wrong.get)  # the first that is no name either, where there is one
        if wrong[stranger]:
            other = next(word for word in words if word not in known)
            raise UserError(f"--labels {path}: label {stranger[:20]} is the name of a class and no number from 0 to "
                            f"{len(classes) - 1}, but label {other} is no name; give names alone, or numbers alone")
        raise UserError(f"--labels {path}: label {stranger[:20]} is neither the name of a class nor a number from 0 to "
                        f"{len(classes) - 1}; if it is one of ImageNet's development kit, which counts from 1 in its "
                        "own order, use a file with WordNet ids, such as LOC_val_solution.csv")
    return classes, [int(word) for word in words]
