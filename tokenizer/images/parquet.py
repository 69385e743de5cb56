"""Images inside Parquet files, as Hugging Face stores ImageNet: ``train-00000-of-00294.parquet`` and its sisters.

Column ``image`` is a struct of ``bytes`` (the encoded file) and ``path``, column ``label`` an integer; the classes'
names stand in the metadata that the ``datasets`` library writes. Needs pyarrow: ``pip install 'mutor_img[parquet]'``.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mutor_img.common.errors import UserError, reading
from mutor_img.common.files import check_stamp, stamp
from tokenizer.images.source import IMAGENET, ImageSource, class_names, contradiction


@dataclass(frozen=True)
class ParquetImages(ImageSource):
    """The rows of several Parquet files, one after another."""

    shards: list[Path] = field(default_factory=list)
    stamps: list[tuple[int, int]] = field(default_factory=list)  # of each shard, when it was listed
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
        shard = int(self.group_shard[group])
        check_stamp(self.shards[shard], self.stamps[shard])  # in another file, other images would be this group
        # opened anew each time: a file handle must not be shared with reading processes
        with parquet.ParquetFile(self.shards[shard]) as file:
            column = file.read_row_group(int(self.group_index[group]), columns=["image.bytes"]).column("image")
        return pyarrow.compute.struct_field(column, "bytes")

    def class_names(self) -> list[str]:
        """Return the first of each class's synonyms: ``tench, Tinca tinca`` is shown as ``tench``."""
        return [name.split(",")[0] for name in class_names(self.classes)]


def list_parquet(shards: list[Path], classes: list[str] | None = None, *, labelled: bool = True) -> ParquetImages:
    """List the images of Parquet files, in order.

    Args:
        shards: the files.
        classes: all classes in label order; unless given, those that the files' metadata name.
        labelled: False: labels do not matter, and all are 0.

    Raises:
        UserError: pyarrow is missing, a file is damaged or has other columns, a label is out of range, nothing names
            the classes, or what names them disagrees.
    """
    pyarrow, parquet = _import()
    stamps = [stamp(shard) for shard in shards]
    files, sizes, labels, names = [], [], [], None
    group_shard, group_index, group_rows = [], [], []
    for number, shard in enumerate(shards):
        with reading(shard, kind="Parquet file", cure="fetch it again"), parquet.ParquetFile(shard) as file:
            _check_columns(file.schema_arrow, shard, pyarrow, labelled)
            groups = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
            count = sum(groups)
            if labelled:
                names = _same_names(names, _class_names(file.schema_arrow.metadata or {}), shards[0], shard)
                labels.append(_read_labels(file, shard, count))
            else:
                labels.append(np.zeros(count, np.int64))
        files += [f"{shard.name}:{row}" for row in range(count)]
        sizes += [shard.stat().st_size] * count
        group_shard += [number] * len(groups)
        group_index += range(len(groups))
        group_rows += groups
    if not files:
        raise UserError(f"{shards[0]}: holds no rows; download it again")
    numbers = np.concatenate(labels)
    classes = _classes(names, classes, numbers, shards[0]) if labelled else ["images"]
    first = np.cumsum([0, *group_rows])[:-1]
    return ParquetImages(shards[0].parent, classes, files, sizes, numbers, [], shards, stamps, np.array(group_shard),
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


def _check_columns(schema: Any, shard: Path, pyarrow: Any, labelled: bool) -> None:
    types = dict(zip(schema.names, schema.types))
    image, label = types.get("image"), types.get("label")
    fits = image is not None and pyarrow.types.is_struct(image) and any(part.name == "bytes" for part in image)
    if not fits or (labelled and (label is None or not pyarrow.types.is_integer(label))):
        found = ", ".join(f"{name} {kind}" for name, kind in types.items())
        raise UserError(f"{shard}: has the columns {found}; expected image struct<bytes, path> and label int64")


def _read_labels(file: Any, shard: Path, count: int) -> np.ndarray:
    column = file.read(columns=["label"]).column("label")
    if column.null_count:
        raise UserError(f"{shard}: {column.null_count} of {count} rows have no label")
    return column.to_numpy().astype(np.int64)  # (count,)


def _class_names(metadata: dict[bytes, bytes]) -> list[str] | None:
    """Return the class names in what ``datasets`` writes beside a schema, or None where there are none."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def _same_names(names: list[str] | None, more: list[str] | None, first: Path, shard: Path) -> list[str] | None:
    """Return the class names of several files, which must be the same in all that have some."""
    if names and more and names != more:
        place = next((i for i, (a, b) in enumerate(zip(names, more)) if a != b), min(len(names), len(more)))
        raise UserError(f"{shard}: its metadata names {len(more)} classes, which differ from those of {first.name} "
                        f"(from label {place} on); encode each set separately")
    return names or more


def _classes(names: list[str] | None, given: list[str] | None, labels: np.ndarray, shard: Path) -> list[str]:
    classes = given or names
    if classes is None:
        raise UserError(f"{shard}: its metadata names no classes; name them in label order with --classes "
                        f"({IMAGENET}: WordNet ids sorted)")
    if given and names:
        if len(given) != len(names):
            raise UserError(f"{shard}: has {len(names)} classes, but --classes names {len(given)}")
        place = contradiction(names, given)
        if place is not None:
            raise UserError(f"{shard}: label {place} is {names[place]!r} in its metadata, but {given[place]!r} in "
                            "--classes; leave --classes out, or give the list that these labels refer to")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        worst = int(labels.min() if labels.min() < 0 else labels.max())
        raise UserError(f"{shard}: label {worst} is outside 0 to {len(classes) - 1}"
                        f"{' (a split without labels?)' if worst < 0 else ''}")
    return list(classes)
