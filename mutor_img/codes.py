"""The code store: images as VQ codes in memory-mapped arrays, with everything needed to trust them.

A folder holds ``codes.npy`` (images x views x N, uint16), ``labels.npy`` (images, int64) and ``codes.json``.
Opening maps the arrays and reads the JSON: milliseconds for ImageNet's 1.3 GB.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mutor_img.errors import UserError
from mutor_img.files import read_json

BLOCK = 4096  # images a checksum covers


@dataclass
class CodesInfo:
    """The JSON beside the arrays."""

    grid: tuple[int, int]  # rows, columns
    vocabulary: int  # number of codes
    class_names: list[str]  # in label order
    views: list[str]  # e.g. ["plain", "mirror"]
    crop: str  # name of the crop rule
    image_size: int  # pixels a side
    tokenizer: str  # path the tokenizer was read from
    tokenizer_hash: str
    checksums: list[str] = field(default_factory=list)  # sha256 of each block of BLOCK images' codes and labels

    def to_json(self) -> dict:
        """Return the JSON's content."""
        return {"format": "mutor_img codes 1", "block": BLOCK, **asdict(self)}


class Codes:
    """A code store opened for reading.

    Attributes:
        codes: (images, views, N) uint16, memory-mapped.
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
        if meta.pop("format", None) != "mutor_img codes 1" or meta.pop("block", None) != BLOCK:
            raise UserError(f"{self.folder / 'codes.json'}: not a code store of this version; encode the images again")
        try:
            self.info = CodesInfo(**meta)
        except TypeError as error:
            raise UserError(f"{self.folder / 'codes.json'}: {error}; encode the images again") from None
        self.info.grid = tuple(self.info.grid)
        self.codes = _map(self.folder / "codes.npy", np.uint16, 3)
        self.labels = _map(self.folder / "labels.npy", np.int64, 1)
        rows, columns = self.info.grid
        expected = (len(self.labels), len(self.info.views), rows * columns)
        if self.codes.shape != expected:
            raise UserError(f"{self.folder / 'codes.npy'}: shape {self.codes.shape}, but codes.json and labels.npy "
                            f"say {expected}; encode the images again")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, images: np.ndarray, views: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return codes (B, N) int64 and labels (B,) int64 of the given images and views, on the CPU."""
        codes = torch.from_numpy(self.codes[images, views].astype(np.int64))  # (B, N)
        return codes, torch.from_numpy(self.labels[images])

    def verify(self) -> None:
        """Read everything once and compare checksums, code range and label range.

        Raises:
            UserError: naming the first block that is damaged or out of range.
        """
        for block, expected in enumerate(self.info.checksums):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            codes, labels = self.codes[part], self.labels[part]
            if block_checksum(codes, labels) != expected:
                raise UserError(f"{self.folder}: block {block} (images {part.start} to {part.stop - 1}) does not match "
                                "its checksum; encode the images again")
            if codes.size and int(codes.max()) >= self.info.vocabulary:
                raise UserError(f"{self.folder}: code {int(codes.max())} in block {block} is out of range; "
                                f"the vocabulary has {self.info.vocabulary}")
            if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.info.class_names):
                raise UserError(f"{self.folder}: a label in block {block} is outside 0 to "
                                f"{len(self.info.class_names) - 1}")
        if len(self.info.checksums) != -(-len(self) // BLOCK):
            raise UserError(f"{self.folder}: {len(self.info.checksums)} checksums for {len(self)} images")

    def content_hash(self) -> str:
        """Return one sha256 that names these codes: a hash of the block checksums."""
        return hashlib.sha256("".join(self.info.checksums).encode()).hexdigest()


def block_checksum(codes: np.ndarray, labels: np.ndarray) -> str:
    """Return the sha256 of one block's (images, views, N) uint16 codes and (images,) int64 labels."""
    digest = hashlib.sha256(np.ascontiguousarray(codes).tobytes())
    digest.update(np.ascontiguousarray(labels).tobytes())
    return digest.hexdigest()


def _map(path: Path, dtype: type, dimensions: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; encode the images again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable .npy array ({error}); encode the images again") from None
    if array.dtype != dtype or array.ndim != dimensions:
        raise UserError(f"{path}: {array.ndim}-dimensional {array.dtype}; expected {dimensions}-dimensional "
                        f"{np.dtype(dtype)}; encode the images again")
    return array
