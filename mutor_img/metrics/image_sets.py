"""Sets of images to score: an npz streamed out of its zip, a folder of PNGs, or an array in memory.

An image set is any iterable of (B, H, W, C) uint8 arrays, with B of its own choice and C 1 or 3, whose ``len``
is the number of images. It can be iterated more than once. The attributes ``name``, ``labels`` ((N,) int64 or
None), ``class_names`` and ``size`` ((H, W), or None where it is not known) are optional. So is ``read(start, stop)``,
which returns images start to stop - 1: of a set that has it, each of several processes reads its own share only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mutor_img.common.arrays import read_header
from mutor_img.common.errors import UserError, reading
from mutor_img.common.file_kinds import kind_of
from mutor_img.common.folders import GONE, list_folder
from mutor_img.common.images import MOST_PIXELS, NO_LOSS, check_pixels, read_image

_CHUNK = 64  # images read at once
_MOST_BYTES = 2**31  # of an array that is read whole: features of 250 000 images, or a covariance of 16 384 of them


class ImageSet(Protocol):
    """See the module: what the evaluator iterates over."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[np.ndarray]: ...


class _Indexed(ABC):
    """An image set that can be read at any place."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Return images ``start`` to ``stop`` - 1 as (stop - start, H, W, C) uint8."""

    def __iter__(self) -> Iterator[np.ndarray]:
        return in_chunks(self)


def in_chunks(images: _Indexed) -> Iterator[np.ndarray]:
    """Yield all images of a set that can be read at any place, a few at a time."""
    for start in range(0, len(images), _CHUNK):
        yield images.read(start, min(start + _CHUNK, len(images)))


class ArrayImages(_Indexed):
    """Images in memory: (N, H, W, C) uint8, with (N,) integer labels or None."""

    def __init__(self, images: np.ndarray, labels: Sequence[int] | np.ndarray | None = None, name: str = "memory"):
        self.images = np.asarray(images)
        _check_layout(name, self.images.dtype, self.images.shape)
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.name, self.size = name, self.images.shape[1:3]
        if self.labels is not None and self.labels.shape != (len(self.images),):
            raise UserError(f"{name}: labels have shape {self.labels.shape} for {len(self.images)} images")

    def __len__(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.images[start:stop]


class NpzImages:
    """The images of an npz file, read a chunk at a time: 50 000 at 256 px would take 9.8 GB at once.

    Args:
        path: the file, ``arr_0`` (N, H, W, C) uint8, ``arr_1`` (N,) integer labels if present.

    Raises:
        UserError: no readable zip, no ``arr_0``, or an ``arr_0`` that is no uint8 image array. A file whose end is
            missing, or whose checksum is wrong, is found while it is read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.name = self.path.name
        self.members = npz_members(self.path)
        if "arr_0" not in self.members:
            raise UserError(f"{path}: no array arr_0 of images; it holds {listing(self.members)}")
        self.shape = _image_shape(self.path, "arr_0")
        self.size = self.shape[1:3]
        self.labels = self._labels() if "arr_1" in self.members else None

    def _labels(self) -> np.ndarray:
        shape, dtype = npz_layout(self.path, "arr_1")
        if shape != (len(self),) or dtype.kind not in "iu":
            raise UserError(f"{self.path}: arr_1 is {dtype} of shape {shape}; labels are integers, one for each of the "
                            f"{len(self)} images")
        return read_npz_array(self.path, "arr_1").astype(np.int64)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        size = math.prod(self.shape[1:])
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
                read_header(stream)
                chunk = max(1, min(_CHUNK, 3 * MOST_PIXELS // size))
                for start in range(0, len(self), chunk):
                    count = min(chunk, len(self) - start)
                    raw = stream.read(count * size)
                    if len(raw) < count * size:
                        raise EOFError(f"{start + len(raw) // size} of {len(self)} images")
                    yield np.frombuffer(raw, dtype=np.uint8).reshape(count, *self.shape[1:])
        except Exception as error:  # damage shows in errors of many kinds
            raise UserError(f"{self.path}: damaged or cut off ({_reason(error)}); write it again") from None

    def content(self) -> str:
        """Return a hash of names, sizes and checksums as the zip lists them: no image is read."""
        with zipfile.ZipFile(self.path) as archive:
            return _digest([[i.filename, i.file_size, i.CRC] for i in archive.infolist()])


def npz_members(path: str | os.PathLike) -> set[str]:
    """Return the names of the arrays in an npz file.

    Raises:
        UserError: the file is missing, is no zip, or ends early.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for name in names:  # a member whose name is damaged in the list at the end would only seem to be missing
                archive.open(name).close()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except Exception as error:
        if (kind := kind_of(path)) is not None:
            raise UserError(f"{path}: {kind}; give an npz: numpy.savez(file, mu=..., sigma=...) of statistics, "
                            "numpy.savez(file, arr_0=...) of uint8 images") from None
        raise UserError(f"{path}: not a whole npz file ({_reason(error)}); it may be cut off: write it again") from None
    if any(name.endswith("/data.pkl") for name in names):
        raise UserError(f"{path}: a file of torch.save, not an npz; save its arrays with numpy.savez")
    return {name.removesuffix(".npy") for name in names}


def listing(names: Collection[str]) -> str:
    """Return names for a message, the first of them if there are many."""
    return ", ".join(sorted(names)[:20]) + f" and {len(names) - 20} more" * (len(names) > 20)


def read_npz_array(path: str | os.PathLike, name: str) -> np.ndarray:
    """Read one array of an npz file into memory; arrays of Python objects are refused, unread.

    Raises:
        UserError: as :func:`npz_layout`, or the array is damaged.
    """
    npz_layout(path, name)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]
    except Exception as error:
        raise UserError(f"{path}: the array {name} cannot be read ({_reason(error)})") from None


def npz_layout(path: str | os.PathLike, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and dtype of an array in an npz file, once it is known to be one that can be read whole.

    Raises:
        UserError: it cannot be read, holds Python objects, is cut off, or would take more memory than any array that
            is read whole should.
    """
    shape, _, dtype, held = _header(path, name)
    wanted = math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise UserError(f"{path}: {name} holds Python objects, which are not read because they can run code")
    if wanted > _MOST_BYTES:
        raise UserError(f"{path}: {name} is {dtype} of shape {shape}, {wanted / 2**30:.3g} GiB; an array that is read "
                        f"whole has {_MOST_BYTES // 2**30} GiB at most")
    if held != wanted:
        raise UserError(f"{path}: {name} should hold {wanted} bytes, but holds {held}; it is damaged or cut off")
    return shape, dtype


def _header(path: str | os.PathLike, name: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Return what an array in an npz file says of itself: shape, Fortran order, dtype; and the bytes that it holds."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
            return *read_header(stream), archive.getinfo(f"{name}.npy").file_size - stream.tell()
    except Exception as error:
        raise UserError(f"{path}: the array {name} cannot be read ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _image_shape(path: Path, name: str) -> tuple[int, ...]:
    """Return the shape of an image array from its header, after checking it."""
    shape, fortran, dtype, held = _header(path, name)
    _check_layout(f"{path}: {name}", dtype, shape)
    if fortran:
        raise UserError(f"{path}: {name} is in Fortran order; save it C-contiguous")
    if held != math.prod(shape):
        raise UserError(f"{path}: {name} should hold {shape[0]} images of {math.prod(shape[1:])} bytes, but holds "
                        f"{held} bytes; it is damaged or cut off")
    return shape


def _check_layout(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype.hasobject:
        raise UserError(f"{name} holds Python objects, which are not read because they can run code; save plain uint8")
    if dtype != np.uint8:
        raise UserError(f"{name} is {dtype}; images are uint8 in 0..255, rounded as floor(127.5 x + 128)")
    if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise UserError(f"{name} has shape {shape}; images are (N, H, W, 3), at least one")
    check_pixels(name, shape[2], shape[1])


class FolderImages(_Indexed):
    """The PNG images of a folder, or of an ImageFolder tree, whose sub-folders in alphabetical order are classes.

    The files and their order are those of :mod:`mutor_img.common.folders`, as in every command. ``labels`` and
    ``class_names`` are None where images lie in the folder itself.

    Args:
        folder: the folder.
        split: take the images of this split only, where names tell several.

    Raises:
        UserError: no folder, no images, JPEGs, or a folder that is refused there; while reading, an unreadable image
            or one of another size.
    """

    def __init__(self, folder: str | os.PathLike, split: str | None = None):
        found = list_folder(folder, split)
        self.path, self.files = found.root, [Path(file) for file in found.files]
        self.name = self.path.name if self.path.name not in ("", "..") else str(self.path.resolve())
        self.name += f", {found.split}" if found.split else ""
        jpeg = next((file for file in self.files if file.suffix.lower() in (".jpg", ".jpeg", ".webp")), None)
        if jpeg is not None:
            raise UserError(f"{self.path / jpeg}: {NO_LOSS}")
        if GONE in found.sizes:
            self._image(found.sizes.index(GONE))  # says what is wrong with it
        self.class_names = found.folders
        self.labels = None if found.folders is None else np.array(found.places, np.int64)

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(H, W) of the first image, which all must have."""
        return self._image(0).shape[:2]

    def read(self, start: int, stop: int) -> np.ndarray:
        images = [self._image(index) for index in range(start, stop)]
        for file, image in zip(self.files[start:stop], images):
            if image.shape[:2] != self.size:
                raise UserError(f"{self.path / file} is {image.shape[1]} x {image.shape[0]} pixels, the first image "
                                f"{self.size[1]} x {self.size[0]}; all must be of one size")
        return np.stack(images)

    def content(self) -> str:
        """Return a hash of the relative paths; no image is read."""
        return _digest([file.as_posix() for file in self.files])

    def _image(self, index: int) -> np.ndarray:
        return np.asarray(read_image(self.path / self.files[index], lossy=False))  # (H, W, 3)

    def sha256(self) -> str:
        """Return one hash over the relative paths and the bytes of all files."""
        digest = hashlib.sha256()
        for file in self.files:
            with reading(str(self.path / file)):
                content = (self.path / file).read_bytes()
            digest.update(os.fsencode(file.as_posix()) + b"\0" + hashlib.sha256(content).digest())
        return digest.hexdigest()


def content(images: ImageSet) -> Any:
    """Return as a JSON value what tells an image set from another, as far as that is known without reading images."""
    return images.content() if hasattr(images, "content") else getattr(images, "manifest", None)


def _digest(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def rebatch(images: Iterable[np.ndarray], size: int, limit: int) -> Iterator[np.ndarray]:
    """Yield the first ``limit`` images in batches of exactly ``size`` (the last may be short).

    Fixed batches make the features independent of how the source happens to cut its own.
    """
    held: list[np.ndarray] = []
    count, left = 0, limit
    for batch in images:
        part = np.asarray(batch)[:left]
        left -= len(part)
        while len(part):
            take = part[: size - count]
            held.append(take)
            count += len(take)
            part = part[len(take) :]
            if count == size:
                yield np.concatenate(held)
                held, count = [], 0
        if left == 0:
            break
    if held:
        yield np.concatenate(held)


def shares(images: ImageSet, size: int, count: int, rank: int, world: int) -> Iterator[np.ndarray | None]:
    """Yield this process's batch of each round, in which the ``world`` processes take one batch of ``size`` each.

    None where the last round has no batch left for this process.

    Raises:
        UserError: the set yields fewer images than its length, or they cannot be read.
    """
    name = getattr(images, "name", "the image set")
    if hasattr(images, "read"):
        for start in range(rank * size, -(-count // (size * world)) * size * world, size * world):
            stop = min(start + size, count)
            batch = images.read(start, stop) if start < count else None
            if batch is not None and len(batch) < stop - start:
                raise UserError(f"{name} yields {start + len(batch)} images, its length says {len(images)}")
            yield batch
        return
    batches, seen = rebatch(images, size, count), 0
    while seen < count:
        round_ = list(islice(batches, world))
        wanted, seen = min(seen + size * world, count), seen + sum(map(len, round_))
        if seen < wanted:
            raise UserError(f"{name} yields {seen} images, its length says {len(images)}")
        yield round_[rank] if rank < len(round_) else None


def read_all(images: ImageSet) -> np.ndarray:
    """Return all images as one (N, H, W, C) uint8 array; for small images only."""
    return next(rebatch(images, len(images), len(images)))
