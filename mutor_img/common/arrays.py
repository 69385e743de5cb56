"""Arrays in files: written a part at a time, and read once their header fits the file."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mutor_img.common.errors import UserError, reading
from mutor_img.common.files import write_atomic

_MOST_HEADER = 10_000  # bytes of an array's header, of which numpy itself reads more before it refuses them
# zip's first moment. The time of writing must not change the bytes, and a clock may stand before it: at 1970, where a
# machine's battery is empty.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_npy(file: BinaryIO, dtype: np.dtype | type, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """Write the bytes that ``numpy.save`` would; the parts join along the first axis.

    On a full disk numpy's own ways to a file end in an error that doesn't say so, or, memory-mapped, in a signal.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for part in parts:
        file.write(np.ascontiguousarray(part, dtype).data)


def save_npy(path: str | os.PathLike, dtype: np.dtype | type, shape: tuple[int, ...],
             parts: Iterable[np.ndarray]) -> Path:
    """Write what :func:`write_npy` does to a file of its own, whole or not at all."""
    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            write_npy(file, dtype, shape, parts)

    return write_atomic(path, write)


def write_array(archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...],
                parts: Iterable[np.ndarray]) -> None:
    """Write one array into a zip as ``numpy.savez`` would, a part at a time; the parts join along the first axis."""
    with archive.open(zipfile.ZipInfo(name, _EPOCH), "w", force_zip64=True) as file:
        write_npy(file, dtype, shape, parts)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write what ``numpy.savez`` would, whatever the clock and the ending of the path: equal arrays, equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            write_array(archive, f"{name}.npy", array.dtype, array.shape, [array])


def load_npy(path: str | os.PathLike, cure: str, mmap_mode: str | None = None) -> np.ndarray:
    """Return the array of a .npy file, whole or memory-mapped. No array of Python objects, which could run code.

    Args:
        path: the file.
        cure: what the message of an error advises.
        mmap_mode: as for ``numpy.load``.

    Raises:
        UserError: it is missing, is something else, or is longer or shorter than its header says.
    """
    with reading(path, kind=".npy array", cure=cure):
        try:
            with open(path, "rb") as file:
                shape, _, dtype = read_header(file)
                wanted, held = file.tell() + math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; {cure}") from None
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        if wanted != held:
            raise ValueError(f"by its header it has {wanted} bytes, but there are {held}")
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)


def read_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, whether it is in Fortran order, and dtype of the .npy header at the start of a stream.

    Raises:
        Exception: of any kind, for what is no such header.
    """
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"npy format {version} is not supported")
    return read(_ShortReads(stream), max_header_size=_MOST_HEADER)


class _ShortReads:
    """A stream of which no read is longer than a header: numpy would read gigabytes of one before it refuses it."""

    def __init__(self, stream: Any):
        self._stream = stream

    def read(self, size: int) -> bytes:
        if size > _MOST_HEADER:
            raise ValueError(f"its header has {size} bytes")
        return self._stream.read(size)
