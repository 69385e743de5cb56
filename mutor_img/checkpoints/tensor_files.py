"""Named tensors in safetensors files: whole in one file, or by rows in one file per process; never pickle.

The header of a sharded file holds, as JSON under ``rows``, the first row of each slice and the rows of the whole
tensor. Whoever reads takes the rows that it needs from the files that have them, so that the number of processes may
change between writing and reading.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mutor_img.common.errors import UserError
from mutor_img.common.files import file_hash, parse_json

Files = dict[str, dict[str, Any]]  # size and sha256 by file name, as checkpoint.json holds them

# safetensors' names, in the order in which its files hold them: the widest first, so that each stands aligned.
DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Slice:
    """Consecutive rows of a tensor.

    Attributes:
        tensor: (rows here, ...), perhaps none.
        start: the first of them in the whole tensor.
        total: rows of the whole tensor.
    """

    tensor: Tensor
    start: int
    total: int


def write_groups(folder: Path, tensors: dict[str, dict[str, Tensor | Slice]], rank: int = 0, world: int = 1) -> Files:
    """Write this process's file of each group, flushed to disk; returns size and sha256 by file name.

    A group in which some tensors are slices becomes one file per process; what is whole in it stands in rank 0's. Any
    other group is one file, and rank 0's business.
    """
    files = {}
    for group, content in tensors.items():
        sharded = any(isinstance(value, Slice) for value in content.values())
        if rank > 0 and not sharded:
            continue
        held, rows = {}, {}
        for name, value in content.items():
            if isinstance(value, Slice):
                if len(value.tensor):
                    held[name], rows[name] = value.tensor, [value.start, value.total]
            elif rank == 0:
                held[name] = value
        path = folder / (f"{group}.{rank:05d}-of-{world:05d}.safetensors" if sharded else f"{group}.safetensors")
        files[path.name] = save_file(held, path, metadata={"rows": json.dumps(rows)} if sharded else None)
    return files


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> dict[str, Any]:
    """Write named tensors as a safetensors file, flushed to disk; returns ``bytes`` and ``sha256`` of what was written.

    The bytes are those of the library's own writer. That takes a path and nothing else, so that a hash would read again
    what may be gigabytes, and wants all tensors in host memory at once. Here they come one by one.

    Raises:
        OSError: the disk is full.
    """
    order = list(DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    try:
        with open(path, "wb") as file:
            for piece in (len(text).to_bytes(8, "little"), text, *map(_bytes_of, map(tensors.__getitem__, names))):
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a write doesn't name its file
        raise OSError(error.errno, error.strerror, str(path)) from None
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's numbers in row-major order, copied to the CPU where it is elsewhere."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy() if len(flat) else b"")  # strides of an empty one allow no view


def differs(path: Path, expected: dict[str, Any], content: bool = True) -> bool:
    """Tell whether a file is not what a checkpoint's JSON says of it: by its size and, with ``content``, its sha256."""
    return path.stat().st_size != expected["bytes"] or (content and file_hash(path) != expected["sha256"])


def has_group(files: Files, group: str) -> bool:
    """Tell from a checkpoint's files whether it holds a group of tensors."""
    return bool(group_files(files, group))


def sampled_group(files: Files) -> str:
    """Return the group that sampling takes its weights from: the average where there is one."""
    return "ema" if has_group(files, "ema") else "model"


def group_hash(files: Files, group: str) -> str:
    """Return the sha256 of a group's file; of a sharded group, that of its files' hashes one after the other."""
    hashes = [files[name]["sha256"] for name in group_files(files, group)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def group_files(files: Files, group: str) -> list[str]:
    """Return the names of a group's files, in the order of their ranks."""
    return sorted(n for n in files if re.fullmatch(rf"{group}(\.\d{{5}}-of-\d{{5}})?\.safetensors", n))


class TensorGroup:
    """The named tensors of one group of a checkpoint, read from as many files as were written, whole or by rows.

    Attributes:
        shapes: the whole tensors' shapes by name.
    """

    def __init__(self, folder: Path, files: Files, group: str, rank: int = 0, world: int = 1):
        """Open the files, and check the hashes of every ``world``-th file from the ``rank``-th: all, between them.

        Raises:
            UserError: a file is missing, shorter than written, not safetensors, or its hash differs.
        """
        self.origin = folder / f"{group}.safetensors"
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[tuple[int, safe_open]]] = {}  # first row, and the file that holds it and more
        names = group_files(files, group)
        if not names:
            raise UserError(f"{self.origin}: no such file in this checkpoint; use another checkpoint")
        for number, name in enumerate(names):
            self._open(folder / name, files[name], check=number % world == rank or world > len(names))

    def _open(self, path: Path, expected: dict[str, Any], check: bool) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file in this checkpoint; use another checkpoint")
        if differs(path, expected, check):
            raise UserError(f"{path}: damaged (its size or sha256 differs from checkpoint.json); use another "
                            "checkpoint")
        file = _open_safetensors(path)
        rows = _rows(file, path)
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            start, total = rows.get(name, (0, None))
            shape = tuple(file.get_slice(name).get_shape())
            if total is not None and not shape:
                raise UserError(f"{path}: damaged (rows of {name!r}, which is one number); use another checkpoint")
            self.shapes[name] = shape if total is None else (total, *shape[1:])
            self._parts.setdefault(name, []).append((start, file))

    def read_all(self) -> dict[str, Tensor]:
        """Return all tensors by name, whole, on the CPU."""
        return {name: self.read(name) for name in self.shapes}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows ``start`` to ``stop`` of a tensor (None: to its end; a scalar has none), on the CPU.

        Raises:
            UserError: the files do not hold all of them.
        """
        shape, parts = self.shapes[name], sorted(self._parts[name], key=lambda part: part[0])
        if not shape:
            return parts[0][1].get_tensor(name)
        stop = shape[0] if stop is None else stop
        pieces, reached = [torch.empty(0, *shape[1:])] if start == stop else [], start
        for first, file in parts:
            part = file.get_slice(name)
            last = min(stop, first + part.get_shape()[0])
            if first <= reached < last:
                pieces.append(part[reached - first:last - first])
                reached = last
        if reached < stop:
            raise UserError(f"{self.origin}: row {reached} of {name!r} is in none of its files; use another checkpoint")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _rows(file: safe_open, path: Path) -> dict[str, list[int]]:
    """Return the first row and the rows of the whole of each tensor of which a file holds a slice."""
    rows = parse_json((file.metadata() or {}).get("rows", "{}"), path)
    if not isinstance(rows, dict) or not all(
            isinstance(row, list) and len(row) == 2 and all(type(n) is int and n >= 0 for n in row)
            for row in rows.values()):
        raise UserError(f"{path}: damaged (its header does not say which rows it holds); use another checkpoint")
    return rows


def _open_safetensors(path: str | Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
