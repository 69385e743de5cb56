"""Images inside Parquet files, as Hugging Face stores ImageNet: ``train-00000-of-00294.parquet`` and its sisters.

Column ``image`` is a struct of ``bytes`` (the encoded file) and ``path``, column ``label`` an integer; the classes'
names stand in the metadata that the ``datasets`` library writes. Needs pyarrow: ``pip install 'mutor_img[parquet]'``.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mutor_img.common.errors import UserError
from tokenizer.images.source import IMAGENET, ImageSource, class_names

_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.parquet")


@dataclass(frozen=True)
class ParquetImages(ImageSource):
    """The rows of several Parquet files, one after another."""

    shards: list[Path] = field(default_factory=list)
    group_shard: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (row groups,) shard number
    group_index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (row groups,) place in its shard
    group_first: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (row groups,) first image number
    _last: dict[int, Any] = field(default_factory=dict, repr=False)  # the row group read last

    def open(self, index: int) -> BinaryIO:
        """Return the bytes of one image. Reads its whole row group, and keeps it for the next."""
        group = int(np.searchsorted(self.group_first, index, side="right")) - 1
        if group not in self._last:
            self._last.clear()
            self._last[group] = self._read_group(group)
        content = self._last[group][index - int(self.group_first[group])].as_py()
        return io.BytesIO(content or b"")

    def _read_group(self, group: int) -> Any:
        pyarrow, parquet = _import()
        shard = self.shards[self.group_shard[group]]
        try:  # opened anew each time: a file handle must not be shared with reading processes
            with parquet.ParquetFile(shard) as file:
                column = file.read_row_group(int(self.group_index[group]), columns=["image.bytes"]).column("image")
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{shard}: not a readable Parquet file ({error}); fetch it again") from None
        return pyarrow.compute.struct_field(column, "bytes")

    def class_names(self) -> list[str]:
        """Return the first of each class's synonyms: ``tench, Tinca tinca`` is shown as ``tench``."""
        return [name.split(",")[0] for name in class_names(self.classes)]


def find_shards(images: str | Path) -> list[Path]:
    """Return the Parquet files that ``images`` means: a folder that holds them, or such a folder and a split's name.

    ``data/train`` where ``data`` holds ``train-00000-of-00294.parquet`` is the split ``train``. An empty list: there
    are none, and ``images`` is something else.

    Raises:
        UserError: files of several splits, or a file that is missing from its numbered row.
    """
    path = Path(images)
    folder, split = (path, None) if path.is_dir() else (path.parent, path.name)
    if not folder.is_dir():
        return []
    found = sorted(folder.glob("*.parquet"))
    if split is None and any(entry.is_dir() for entry in folder.iterdir()) and not found:
        return []
    numbered = {file: match for file in found if (match := _SHARD.fullmatch(file.name))}
    splits = sorted({match["split"] for match in numbered.values()})
    if split is None and len(splits) > 1:
        raise UserError(f"{folder}: holds the splits {', '.join(splits)}; give {folder / splits[0]}, for example")
    shards = [file for file, match in numbered.items() if split in (None, match["split"])]
    for shard in shards:
        missing = int(numbered[shard]["count"]) - len(shards)
        if missing:
            raise UserError(f"{folder}: {len(shards)} Parquet files of {numbered[shard]['split']}, but their names say "
                            f"{numbered[shard]['count']}; fetch the others")
    return shards if numbered or split else found


def list_parquet(shards: list[Path], classes: list[str] | None = None) -> ParquetImages:
    """List the images of Parquet files, in order.

    Args:
        shards: the files.
        classes: all classes in label order; unless given, those that the files' metadata name.

    Raises:
        UserError: pyarrow is missing, a file is damaged or has other columns, a label is out of range, or nothing
            names the classes.
    """
    pyarrow, parquet = _import()
    files, sizes, labels, names = [], [], [], None
    group_shard, group_index, group_rows = [], [], []
    for number, shard in enumerate(shards):
        try:
            with parquet.ParquetFile(shard) as file:
                _check_columns(file.schema_arrow, shard, pyarrow)
                names = names or _class_names(file.schema_arrow.metadata or {})
                column = file.read(columns=["label"]).column("label")
                groups = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{shard}: not a readable Parquet file ({error}); fetch it again") from None
        if column.null_count:
            raise UserError(f"{shard}: {column.null_count} rows have no label")
        files += [f"{shard.name}:{row}" for row in range(len(column))]
        sizes += [shard.stat().st_size] * len(column)
        labels.append(column.to_numpy().astype(np.int64))
        group_shard += [number] * len(groups)
        group_index += range(len(groups))
        group_rows += groups
    numbers = np.concatenate(labels)
    classes = _classes(names, classes, numbers, shards[0])
    first = np.cumsum([0, *group_rows])[:-1]
    return ParquetImages(shards[0].parent, classes, files, sizes, numbers, [], shards, np.array(group_shard),
                         np.array(group_index), first)


def _import() -> tuple[Any, Any]:
    """Return the modules pyarrow and pyarrow.parquet.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading Parquet files needs pyarrow: pip install 'mutor_img[parquet]'") from None
    return pyarrow, pyarrow.parquet


def _check_columns(schema: Any, shard: Path, pyarrow: Any) -> None:
    types = dict(zip(schema.names, schema.types))
    image, label = types.get("image"), types.get("label")
    fits = image is not None and pyarrow.types.is_struct(image) and any(part.name == "bytes" for part in image)
    if not fits or label is None or not pyarrow.types.is_integer(label):
        found = ", ".join(f"{name} {kind}" for name, kind in types.items())
        raise UserError(f"{shard}: has the columns {found}; expected image struct<bytes, path> and label int64")


def _class_names(metadata: dict[bytes, bytes]) -> list[str] | None:
    """Return the class names in what ``datasets`` writes beside a schema, or None where there are none."""
    try:
        return json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None


def _classes(names: list[str] | None, given: list[str] | None, labels: np.ndarray, shard: Path) -> list[str]:
    classes = given or names
    if classes is None:
        raise UserError(f"{shard}: its metadata name no classes; name them in label order with --classes "
                        f"({IMAGENET}: WordNet ids sorted)")
    if given and names and len(given) != len(names):
        raise UserError(f"{shard}: has {len(names)} classes, but --classes names {len(given)}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        worst = int(labels.min() if labels.min() < 0 else labels.max())
        raise UserError(f"{shard}: label {worst} is outside 0 to {len(classes) - 1}"
                        f"{' (a split without labels?)' if worst < 0 else ''}")
    return list(classes)
