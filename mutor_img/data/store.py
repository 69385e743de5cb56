"""The code store: images as VQ codes in memory-mapped arrays, with everything needed to trust them.

A folder holds ``codes.npy`` (images x views x N; uint16, or uint32 where the vocabulary needs it), ``labels.npy``
(images, int64) and ``codes.json``. Opening maps the arrays and reads the JSON: milliseconds for ImageNet's 1.3 GB.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mutor_img.common.arrays import load_npy
from mutor_img.common.errors import UserError
from mutor_img.common.files import check_format, check_stamp, read_json, stamp

FORMAT = "mutor_img codes 1"
BLOCK = 4096  # images that one checksum covers
MOST_CODES = 2**24  # largest vocabulary; the largest one published is IBQ's, 2**18 (arXiv 2412.02692)


class Fault(IntEnum):
    """What can be wrong with a block."""

    OK = 0
    CHECKSUM = 1
    CODE = 2
    LABEL = 3


@dataclass
class CodesInfo:
    """The JSON beside the arrays."""

    grid: tuple[int, int]  # rows, columns
    vocabulary: int  # number of codes
    class_names: list[str]  # in label order
    views: list[str]  # e.g. ["plain", "mirror"]
    crop: str  # the crop rule with its numbers
    image_size: int | None  # pixels per side; None: nothing says it
    tokenizer: str  # path the tokenizer was read from
    tokenizer_hash: str
    checksums: list[str] = field(default_factory=list)  # sha256 of each block of BLOCK images' codes and labels
    images_hash: str = ""  # sha256 of the images' names: stores of the same images, in order, have the same

    def to_json(self) -> dict:
        """Return the JSON's content."""
        return {"format": FORMAT, "block": BLOCK, **asdict(self)}

    def check(self, origin: Path) -> None:
        """Raise :class:`UserError` for a value of another kind; ``origin`` is named."""
        for name in ("class_names", "views", "checksums"):
            value = getattr(self, name)
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                raise UserError(f"{origin}: {name} is no list of words; encode the images again")
        for name in ("crop", "tokenizer", "tokenizer_hash", "images_hash"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{origin}: {name} is no text; encode the images again")
        sides = list(self.grid) if isinstance(self.grid, (list, tuple)) else []
        numbers = [*sides, self.vocabulary, *([] if self.image_size is None else [self.image_size])]
        if len(sides) != 2 or not all(type(number) is int and number > 0 for number in numbers):
            raise UserError(f"{origin}: grid, vocabulary and image_size are {self.grid}, {self.vocabulary} and "
                            f"{self.image_size}; encode the images again")


class Codes:
    """A code store opened for reading.

    Attributes:
        codes: (images, views, N) of :func:`code_dtype`, memory-mapped.
        labels: (images,) int64.
        info: :class:`CodesInfo`.
    """

    def __init__(self, folder: str | Path):
        """Map the arrays of ``folder``.

        Raises:
            UserError: a missing or foreign file, or arrays whose shapes or dtypes do not fit the JSON.
        """
        self.folder = Path(folder)
        if not (self.folder / "codes.json").is_file():
            raise UserError(f"{folder}: no codes here (codes.json is missing); make them with tokenizer.encode")
        meta = read_json(self.folder / "codes.json")
        check_format(meta.pop("format", None) if isinstance(meta, dict) else None, FORMAT, self.folder / "codes.json")
        if meta.pop("block", None) != BLOCK:
            raise UserError(f"{self.folder / 'codes.json'}: its checksums are not of {BLOCK} images each; encode the "
                            "images again")
        try:
            self.info = CodesInfo(**meta)
            dtype = code_dtype(self.info.vocabulary)
        except TypeError as error:
            raise UserError(f"{self.folder / 'codes.json'}: {error}; encode the images again") from None
        self.info.check(self.folder / "codes.json")
        self.info.grid = tuple(self.info.grid)
        self.codes = _map(self.folder / "codes.npy", dtype, 3)
        self.labels = _map(self.folder / "labels.npy", np.int64, 1)
        self._stamps = {path: stamp(path) for path in (self.folder / "codes.npy", self.folder / "labels.npy")}
        rows, columns = self.info.grid
        expected = (len(self.labels), len(self.info.views), rows * columns)
        if self.codes.shape != expected:
            raise UserError(f"{self.folder / 'codes.npy'}: shape {self.codes.shape}, but codes.json and labels.npy "
                            f"say {expected}; encode the images again")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, images: np.ndarray, views: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return codes (B, N) int64 and labels (B,) int64 of the given images and views, on the CPU.

        Raises:
            UserError: a file of the store is gone, or is not the one that was opened.
        """
        for path, seen in self._stamps.items():
            check_stamp(path, seen)
        codes = torch.from_numpy(self.codes[images, views].astype(np.int64))  # (B, N)
        return codes, torch.from_numpy(self.labels[images])

    @property
    def blocks(self) -> int:
        """Number of blocks, each with a checksum of its own."""
        return -(-len(self) // BLOCK)

    def verify(self) -> None:
        """Read everything once and compare checksums, code range and label range.

        Raises:
            UserError: naming the first block that is damaged or out of range.
        """
        self.refuse(self.faults(range(self.blocks)))

    def faults(self, blocks: Sequence[int]) -> np.ndarray:
        """Read some blocks and return a :class:`Fault` for each block of the store, (blocks,) int64; others stay OK.

        Several processes may each read their own and sum the arrays. Blocks are read by a few threads: hashing
        releases Python's lock.
        """
        found = np.zeros(self.blocks, np.int64)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            done = tqdm(pool.map(self._fault, blocks), total=len(blocks), desc=f"checking {self.folder}",
                        unit="block", delay=5, leave=False)
            for block, fault in zip(blocks, done):
                found[block] = fault
        return found

    def refuse(self, faults: np.ndarray) -> None:
        """Raise :class:`UserError` naming the first block with a fault, if there is one."""
        if len(self.info.checksums) != self.blocks:
            raise UserError(f"{self.folder}: {len(self.info.checksums)} checksums for {len(self)} images; encode the "
                            "images again")
        for block in np.flatnonzero(faults)[:1]:
            images = f"images {block * BLOCK} to {min((block + 1) * BLOCK, len(self)) - 1}"
            raise UserError(f"{self.folder}: block {block} ({images}) {self._say(faults[block])}; remove that folder "
                            "and encode the images again")

    def _fault(self, block: int) -> Fault:
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        codes, labels = self.codes[part], self.labels[part]
        if block_checksum(codes, labels) != (self.info.checksums[block: block + 1] or [""])[0]:
            return Fault.CHECKSUM
        if int(codes.max(initial=0)) >= self.info.vocabulary:
            return Fault.CODE
        classes = len(self.info.class_names)
        return Fault.LABEL if int(labels.min(initial=0)) < 0 or int(labels.max(initial=0)) >= classes else Fault.OK

    def _say(self, fault: int) -> str:
        return {Fault.CHECKSUM: "does not match its checksum",
                Fault.CODE: f"has a code outside of the vocabulary of {self.info.vocabulary}",
                Fault.LABEL: f"has a label outside of 0 to {len(self.info.class_names) - 1}"}[Fault(fault)]

    def content_hash(self) -> str:
        """Return one sha256 that names these codes: a hash of the block checksums."""
        return hashlib.sha256("".join(self.info.checksums).encode()).hexdigest()


def code_dtype(vocabulary: int) -> type[np.unsignedinteger]:
    """Return what the codes of a vocabulary are stored as: the smaller of uint16 and uint32 that holds them all."""
    return np.uint16 if vocabulary <= 2**16 else np.uint32


def block_checksum(codes: np.ndarray, labels: np.ndarray) -> str:
    """Return the sha256 of one block's (images, views, N) codes and (images,) int64 labels."""
    digest = hashlib.sha256(np.ascontiguousarray(codes).reshape(-1))
    digest.update(np.ascontiguousarray(labels))
    return digest.hexdigest()


def _map(path: Path, dtype: type, dimensions: int) -> np.ndarray:
    array = load_npy(path, "encode the images again", mmap_mode="r")
    if array.dtype != dtype or array.ndim != dimensions:
        raise UserError(f"{path}: {array.ndim}-dimensional {array.dtype}; expected {dimensions}-dimensional "
                        f"{np.dtype(dtype)}; encode the images again")
    return array
