"""A watcher that opens every file as soon as it has its final name, while a command runs that will be killed."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open

from benchmarks.chaos.case import Fault
from mutor_img.checkpoints.folder import read_meta
from mutor_img.common.files import read_json, read_lines

PAUSE = 0.004  # seconds between looks


class Watcher:
    """Looks at a folder all the while inside; afterwards raises :class:`Fault` for a file that was not whole."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._seen: dict[Path, tuple[int, ...]] = {}
        self._fault: Fault | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()  # what the kill left
        if self._fault is not None and kind is None:
            raise self._fault

    def _watch(self) -> None:
        while not self._stop.wait(PAUSE) and self._fault is None:
            self._look()

    def _look(self) -> None:
        for path in final_files(self.folder):
            try:
                status = path.stat()
                sign = status.st_ino, status.st_size, status.st_mtime_ns
                if self._seen.get(path) != sign:
                    self._seen[path] = sign
                    open_whole(path)
            except Fault as fault:
                self._fault = self._fault or fault
            except FileNotFoundError:  # replaced or removed just now
                pass


def final_files(folder: Path) -> Iterator[Path]:
    """Yield the files under their final names: not those that are hidden, of a folder of parts the parts alone."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        of_parts = any(part.endswith("parts") for part in Path(place).relative_to(folder).parts)
        yield from (Path(place) / name for name in files
                    if name.startswith("part_") or not (of_parts or name.startswith(".")))


def open_whole(path: Path) -> None:
    """Read a file to its end by what its name says it is.

    Raises:
        Fault: it is not whole.
        FileNotFoundError: it is gone.
    """
    try:
        if path.name == "checkpoint.json":
            missing = [name for name in read_meta(path.parent)["files"] if not (path.parent / name).is_file()]
            whole = not missing or not path.is_file()  # an old one is taken away by one renaming
        elif path.suffix == ".jsonl":  # grows by a line at a time
            whole = read_lines(path) is not None
        elif path.suffix == ".json":
            whole = read_json(path) is not None
        elif path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                whole = archive.testzip() is None
        elif path.suffix == ".npy":
            whole = np.load(path, mmap_mode="r") is not None
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                whole = all(file.get_tensor(name) is not None for name in file.keys())  # noqa: SIM118
        elif path.suffix == ".png":
            with Image.open(path) as image:
                whole = image.load() is not None
        else:
            whole = path.read_bytes().endswith(b"\n")
    except FileNotFoundError:
        raise
    except Exception as error:
        if not path.is_file():
            raise FileNotFoundError(path) from None
        raise Fault(f"{path.name} was there and not whole: {error}") from None
    if not whole:
        raise Fault(f"{path.name} was there and not whole")
