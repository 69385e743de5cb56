"""A sample set on disk: ADM's npz or a folder of PNGs, made in parts, so that a killed run goes on.

``x.npz`` grows under ``x.npz.parts/`` as one file for each ``UNIT`` samples and a JSON of everything that decides
the bytes. When all parts are there they are merged into the npz, the manifest ``x.json`` is written, and the parts
go. A folder grows alike, and holds its manifest. Nothing half-written ever has its final name.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mutor_img.common.arrays import write_array, write_npz
from mutor_img.common.errors import UserError
from mutor_img.common.files import (
    clear,
    filling,
    read_json,
    remove,
    wait_until_seen,
    write_atomic,
    write_json,
    write_sealed,
)
from mutor_img.metrics.image_sets import npz_layout, read_npz_array
from mutor_img.metrics.samples import LABELS_HASH, labels_hash

FORMAT = "mutor_img samples 1"
UNIT = 64  # samples per part; fixed, so that parts are the same for any number of processes and batch size


class SampleArchive:
    """The files of one sample set, an npz.

    Attributes:
        out: the npz.
        manifest: the JSON beside it.
        parts: the folder of an unfinished run.
        settings: everything that decides the bytes, as JSON values.
    """

    def __init__(self, out: str | Path, settings: dict[str, Any]):
        """Name the files; reads and writes nothing."""
        self.out = Path(out)
        self.manifest = self.out.with_suffix(".json")
        self.parts = self.out.with_name(self.out.name + ".parts")
        self.settings = settings
        self.count = settings["num_samples"]

    def is_finished(self) -> bool:
        """Tell whether the samples are there already, of these settings.

        Raises:
            UserError: the samples, their manifest or the parts are of other settings, or of something else.
        """
        started = (self.parts / "settings.json").is_file()
        if started:
            self._compare(read_json(self.parts / "settings.json"), self.parts,
                          "finish that run with its own settings, remove the folder")
        if not self._is_there():
            if self.manifest.is_dir() or (self.manifest.is_file() and not _is_ours(read_json(self.manifest))):
                raise UserError(f"{self.manifest}: the manifest of {self.out.name} would overwrite it, but it is "
                                "not a manifest; choose another --out")
            return False
        if self.manifest.is_file():
            self._compare(read_json(self.manifest), self.out, "remove it")
            return True
        if started and self.out.is_file():  # killed between the npz and its manifest: merge again
            return False
        raise UserError(f"{self.out}: exists without its manifest {self.manifest.name}; remove it, or choose another "
                        "--out")

    def _is_there(self) -> bool:
        return self.out.exists()

    def _compare(self, found: Any, path: Path, fix: str) -> None:
        if not _is_ours(found):
            raise UserError(f"{path}: was not made by this program; {fix}, or choose another --out")
        for key, wanted in self.settings.items():
            if found.get(key) != wanted:
                raise UserError(f"{path}: was made with {key} {_short(found.get(key))}, now it is {_short(wanted)}; "
                                f"{fix}, or choose another --out")

    def start(self) -> list[int] | None:
        """Begin, or go on; returns the numbers of the parts yet to be written, None where the samples are there.

        The settings are noted in the parts' folder. One process calls this.

        Raises:
            UserError: as :meth:`is_finished`.
        """
        if self.is_finished():
            self.remove_parts()
            return None
        if not (self.parts / "settings.json").is_file():
            clear(self.parts)  # parts of unknown settings, such as a removal that was cut short leaves
            clear(self.manifest)  # of samples that are gone: not to stand beside the new ones if this run is killed
        write_sealed(self.parts / "settings.json", self.settings)
        return [unit for unit in self.units() if not self.is_done(unit)]

    def units(self) -> range:
        """Return the numbers of all parts."""
        return range(-(-self.count // UNIT))

    def samples(self, unit: int) -> range:
        """Return the sample numbers of a part."""
        return range(unit * UNIT, min((unit + 1) * UNIT, self.count))

    def is_done(self, unit: int) -> bool:
        """Tell whether a part is written."""
        return self._part(unit).is_file()

    def done(self) -> int:
        """Return how many samples are written, by any process."""
        written = set(os.listdir(self.parts))  # one look, not one for each of hundreds of parts
        return sum(len(self.samples(unit)) for unit in self.units() if self._part(unit).name in written)

    def write(self, unit: int, images: np.ndarray) -> None:
        """Write a part: (its samples, H, W, 3) uint8."""
        # a zip, for its checksum: the part may be read days later
        write_atomic(self._part(unit), lambda aside: write_npz(aside, {"images": images}))

    def merge(self, labels: np.ndarray, about: dict[str, Any]) -> None:
        """Join all parts, write the manifest, remove the parts. One process calls this, once all are done.

        Args:
            labels: (count,) int64.
            about: what the manifest says beside the settings.

        Raises:
            UserError: a part that another process wrote is not seen from here.
        """
        wait_until_seen(lambda: next((self._part(u) for u in self.units() if not self.is_done(u)), None), "--out")
        self._publish(labels, {**self.settings, **about, LABELS_HASH: labels_hash(labels)})
        self.remove_parts()

    def _publish(self, labels: np.ndarray, manifest: dict[str, Any]) -> None:
        shape = (self.count, *npz_layout(self._part(0), "images")[0][1:])

        def write(aside: Path) -> None:
            with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
                write_array(archive, "arr_0.npy", np.dtype(np.uint8), shape, self._images())
                write_array(archive, "arr_1.npy", labels.dtype, labels.shape, [labels])

        write_atomic(self.out, write)
        write_sealed(self.manifest, manifest)

    def _images(self) -> Iterator[np.ndarray]:
        """Yield the images of all parts in order, (UNIT or fewer, H, W, 3) uint8."""
        for unit in self.units():
            try:
                yield read_npz_array(self._part(unit), "images")
            except UserError as error:
                raise UserError(f"{error}; remove that file and run the same command again") from None

    def remove_parts(self) -> None:
        """Remove what an unfinished run leaves."""
        remove(self.parts)

    def _part(self, unit: int) -> Path:
        return self.parts / f"part_{unit:06d}.npz"


class SampleFolder(SampleArchive):
    """The files of one sample set, a folder: 000000.png and on, ``labels.json`` in their order, ``manifest.json``.

    The folder appears whole, by one renaming.
    """

    def __init__(self, out: str | Path, settings: dict[str, Any]):
        super().__init__(out, settings)
        self.manifest = self.out / "manifest.json"

    def _is_there(self) -> bool:
        empty = self.out.is_dir() and not any(self.out.iterdir())
        return self.out.is_symlink() or (self.out.exists() and not empty)  # no folder can take the name of a link

    def _publish(self, labels: np.ndarray, manifest: dict[str, Any]) -> None:
        digits = max(6, len(str(self.count - 1)))  # the order of names is that of numbers
        pixels = (image for part in self._images() for image in part)
        with filling(self.out) as aside:
            for number, image in enumerate(tqdm(pixels, total=self.count, desc="write", unit="image", mininterval=1.0)):
                Image.fromarray(image).save(aside / f"{number:0{digits}d}.png")
            write_json(aside / "labels.json", labels.tolist())
            write_sealed(aside / self.manifest.name, manifest)


def open_archive(out: str | Path, settings: dict[str, Any]) -> SampleArchive:
    """Return the sample set that ``out`` asks for: an npz by its ending, a folder where it has none or a slash.

    Raises:
        UserError: another ending, or no name.
    """
    if not Path(out).name:
        raise UserError(f"{out}: has no name of its own; give a new folder, or a file that ends in .npz")
    if str(out).endswith(os.sep) or not Path(out).suffix:
        return SampleFolder(out, settings)
    if Path(out).suffix != ".npz":
        raise UserError(f"{out}: must end in .npz, or in {os.sep} for a folder of PNGs")
    return SampleArchive(out, settings)


def _is_ours(manifest: Any) -> bool:
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:20] + "…"
