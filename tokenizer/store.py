"""Writing a code store: parts that survive a kill, and their merge into the arrays that count.

While images are encoded, ``<out>/parts/`` fills with one file for up to ``PART`` images. A part carries a fingerprint
of all it was made from, so that a part of another tokenizer, crop or file is made again and never reused. The last file
to appear is ``codes.json``; without it the folder is no code store.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mutor_img.checkpoints.tensor_files import save_file
from mutor_img.common.arrays import save_npy
from mutor_img.common.errors import UserError
from mutor_img.common.files import (
    parse_json,
    read_record,
    remove,
    wait_until_seen,
    write_atomic,
    write_sealed,
)
from mutor_img.common.processes import check_shared
from mutor_img.data.store import BLOCK, Codes, CodesInfo, block_checksum, code_dtype
from mutor_img.training.runtime import Runtime
from tokenizer.images.source import Labelled

PART = 1024  # images per part at most: seconds of work on a GPU
_CONTENT = "content_hash"
SMALLEST, PARTS = 8, 64  # few images are cut into more and smaller parts, so that every process has some


@dataclass(frozen=True)
class Recipe:
    """Everything but the images that decides what the codes are."""

    tokenizer_hash: str
    views: tuple[str, ...]
    crop: str
    image_size: int  # pixels per side


class StoreWriter:
    """The parts of one code store under ``out``, for images of ``source`` made by ``recipe``.

    ``maker`` is the command that makes it, as ``encode.json`` says.
    """

    def __init__(self, out: str | Path, source: Labelled, recipe: Recipe, maker: str = "encode"):
        self.out, self.source, self.recipe = Path(out), source, recipe
        self.parts = self.out / "parts"
        self.files = [self.out / name for name in ("codes.npy", "labels.npy", "codes.json")]
        self.manifest = {"format": f"mutor_img {maker} 1", **asdict(recipe), "views": list(recipe.views),
                         "images": len(source), "files_hash": files_hash(source)}
        if samples := source.samples_of(slice(None)):
            self.manifest[_CONTENT] = _digest(samples)
        self._fingerprints: dict[int, str] = {}  # by part: each is asked for many times, and may read files

    def finished(self) -> bool:
        """Tell whether ``out`` already holds these very codes, complete.

        Raises:
            UserError: it holds codes made from something else, and what differs.
        """
        if not (self.out / "codes.json").is_file():
            return False
        made = read_record(self.out / "encode.json") if (self.out / "encode.json").is_file() else {}
        made = {_CONTENT: self.manifest.get(_CONTENT), **made}  # which older files do not say
        for name, value in self.manifest.items():
            if made.get(name) != value:
                raise UserError(f"{self.out}: holds other codes ({name} is {made.get(name)}, but now it is {value}); "
                                "give another --out, or remove that folder")
        codes = Codes(self.out)  # raises where an array is damaged
        if codes.info.class_names != self.source.class_names():
            raise UserError(f"{self.out}: holds codes of {len(codes.info.class_names)} classes, which are not these "
                            f"{len(self.source.classes)}; give another --out, or remove that folder")
        remove(self.parts)  # left by a kill between the last file and this
        return True

    @property
    def part_size(self) -> int:
        """Images per part: a function of their number alone, so that any number of processes makes the same parts."""
        return min(PART, max(SMALLEST, -(-len(self.source) // PARTS)))

    def missing(self) -> list[int] | None:
        """Return the numbers of the parts that are yet to be written; None where all codes are there."""
        return None if self.finished() else [part for part in range(self.count()) if not self.is_done(part)]

    def count(self) -> int:
        """Return the number of parts."""
        return -(-len(self.source) // self.part_size)

    def range(self, part: int) -> range:
        """Return the image numbers of a part."""
        return range(part * self.part_size, min((part + 1) * self.part_size, len(self.source)))

    def is_done(self, part: int) -> bool:
        """Tell whether a part is there, is of this recipe and these files, and had no unreadable image."""
        return self._left_out(part) == {}

    def _left_out(self, part: int) -> dict[str, str] | None:
        """Return a part's unreadable images, reason by file name; None if it is not there, or of something else."""
        try:
            with safe_open(self._path(part), framework="numpy") as file:
                meta = file.metadata() or {}
        except (SafetensorError, OSError):
            return None
        ours = meta.get("fingerprint") == self._fingerprint(part) and meta.keys() >= {"unreadable", "checksum"}
        return parse_json(meta["unreadable"], self._path(part)) if ours else None

    def write(self, part: int, codes: np.ndarray, unreadable: dict[str, str]) -> None:
        """Write one part, whole or not at all.

        Args:
            part: its number.
            codes: (images, views, N), of the vocabulary's dtype, of the part's readable images, in order.
            unreadable: reason by file name of the others.
        """
        labels = np.array([self.source.labels[i] for i in self.range(part) if self.source.files[i] not in unreadable],
                          dtype=np.int64)
        meta = {"fingerprint": self._fingerprint(part), "unreadable": json.dumps(unreadable),
                "checksum": _part_checksum(codes, labels, unreadable)}
        tensors = {"codes": torch.from_numpy(codes), "labels": torch.from_numpy(labels)}
        write_atomic(self._path(part), lambda aside: save_file(tensors, aside, meta))

    def unreadable(self) -> dict[str, str]:
        """Return the reason by file name of every image that could not be read, from all parts, which must be written.

        Raises:
            UserError: a part that another process wrote is not seen from here.
        """
        parts = range(self.count())
        wait_until_seen(lambda: next((self._path(p) for p in parts if self._left_out(p) is None), None), "--out")
        found = {}
        for part in parts:
            found |= self._left_out(part)
        return found

    def merge(self, tokenizer: str, grid: tuple[int, int], vocabulary: int) -> None:
        """Join all parts into ``codes.npy``, ``labels.npy`` and, last, ``codes.json``; then remove the parts."""
        unreadable = self.unreadable()
        count = len(self.source) - len(unreadable)
        shape = (count, len(self.recipe.views), grid[0] * grid[1])
        found: list[np.ndarray] = []
        path = save_npy(self.out / "codes.npy", code_dtype(vocabulary), shape, self._part_codes(found))
        codes, labels = np.load(path, mmap_mode="r"), np.concatenate(found)
        blocks = [slice(first, first + BLOCK) for first in range(0, count, BLOCK)]
        kept = [name for name in self.source.files if name not in unreadable]
        info = CodesInfo(grid, vocabulary, self.source.class_names(), list(self.recipe.views), self.recipe.crop,
                         self.recipe.image_size, tokenizer, self.recipe.tokenizer_hash,
                         [block_checksum(codes[b], labels[b]) for b in blocks], _digest(kept))
        save_npy(self.out / "labels.npy", np.int64, labels.shape, [labels])
        made = {**self.manifest, "classes": self.source.classes, "unreadable": unreadable}
        write_sealed(self.out / "encode.json", made)
        write_sealed(self.out / "codes.json", info.to_json())
        remove(self.parts)

    def _part_codes(self, labels: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the codes of one part after another, and append its labels."""
        for part in range(self.count()):
            codes, part_labels = self._read(part)
            labels.append(part_labels)
            yield codes

    def _read(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a part's codes (images, views, N) and labels (images,).

        Raises:
            UserError: it is not what was written.
        """
        try:
            with safe_open(self._path(part), framework="numpy") as file:
                codes, labels, meta = file.get_tensor("codes"), file.get_tensor("labels"), file.metadata()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._path(part)}: {error}; remove it and run the same command again") from None
        if meta["checksum"] != _part_checksum(codes, labels, self._left_out(part)):
            raise UserError(f"{self._path(part)}: damaged (it does not match its checksum); remove it and run the same "
                            "command again")
        return codes, labels

    def _path(self, part: int) -> Path:
        return self.parts / f"part_{part:06d}.safetensors"

    def _fingerprint(self, part: int) -> str:
        if part not in self._fingerprints:
            images = slice(self.range(part).start, self.range(part).stop)
            self._fingerprints[part] = _digest([asdict(self.recipe), _listing(self.source, images),
                                                *self.source.samples_of(images)])
        return self._fingerprints[part]


def write_store(writer: StoreWriter, rows: Callable[[Sequence[int]], Iterator[tuple[np.ndarray, str]]],
                runtime: Runtime, tokenizer: str, grid: tuple[int, int], vocabulary: int,
                max_unreadable: int = 0) -> Codes:
    """Fill a code store, going on from what an earlier run left there; all processes call this with the same arguments.

    Args:
        writer: the store.
        rows: from image numbers to the (views, N) codes of one image after another, each with its reading error or an
            empty string.
        runtime: this process among all.
        tokenizer: path of the tokenizer.
        grid: rows and columns of codes.
        vocabulary: number of codes.
        max_unreadable: images that may be left out because they cannot be read.

    Raises:
        UserError: an existing store that is another one, too many unreadable images, or processes that see other
            images or another tokenizer.
    """
    runtime.agree({**writer.manifest, "classes": writer.source.classes})
    todo = runtime.from_main(writer.missing)
    if todo is None:
        if runtime.is_main:
            print(f"{writer.out}: these {len(writer.source)} images are there already; nothing to do")
        return Codes(writer.out)
    check_shared(writer.out, "--out")
    mine = todo[runtime.rank:: runtime.world]
    numbers = [number for part in mine for number in writer.range(part)]
    with closing(rows(numbers)) as made:  # its progress bar ends before an error is said
        for part in mine:
            _write_part(writer, part, made)
    runtime.barrier()
    runtime.from_main(lambda: _report_unreadable(writer, max_unreadable))
    if runtime.is_main:
        writer.merge(tokenizer, grid, vocabulary)
    runtime.barrier()
    wait_until_seen(lambda: next((p for p in writer.files if not p.is_file()), None), "--out")
    return Codes(writer.out)


def _write_part(writer: StoreWriter, part: int, rows: Iterator[tuple[np.ndarray, str]]) -> None:
    codes, unreadable = [], {}
    for number in writer.range(part):
        row, error = next(rows)
        if error:
            unreadable[writer.source.files[number]] = error
        else:
            codes.append(row)
    writer.write(part, np.stack(codes) if codes else row[None][:0], unreadable)


def _report_unreadable(writer: StoreWriter, limit: int) -> None:
    """List every unreadable image on stderr and in ``unreadable.txt``; one process calls this, once all parts are done.

    Raises:
        UserError: there are more than ``limit``.
    """
    found, listing = writer.unreadable(), writer.out / "unreadable.txt"
    if not found:
        remove(listing)  # of an earlier start, whose images have been mended
        return
    names = "".join(f"{name}\n" for name in found)
    write_atomic(listing, lambda aside: aside.write_bytes(os.fsencode(names)))
    print("\n".join(found.values()), file=sys.stderr)
    if len(found) > limit:
        raise UserError(f"{len(found)} of {len(writer.source)} images in {writer.source.root} cannot be read (listed "
                        f"above and in {listing}; first: {next(iter(found))}); fix them and run "
                        f"the same command again, or leave them out with --max-unreadable {len(found)}")


def files_hash(source: Labelled) -> str:
    """Return one sha256 of the names, sizes and labels of all images: another list of images has another."""
    return _digest(_listing(source, slice(None)))


def _listing(source: Labelled, images: slice) -> list:
    return [source.files[images], source.sizes[images], source.labels[images].tolist()]


def _part_checksum(codes: np.ndarray, labels: np.ndarray, unreadable: dict[str, str] | None) -> str:
    return _digest([block_checksum(codes, labels), unreadable])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
