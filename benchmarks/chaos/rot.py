"""Files that rot: a byte that changes or an end that is lost, in every kind of file that the project writes.

What is loaded from a rotten file is the very content that was written, or the file is refused by its name. Of a run
whose newest checkpoint is rotten, the newest intact one is named.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.chaos import inputs
from benchmarks.chaos.case import Case, Fault, Place, said_no
from mutor_img.checkpoints import folder as checkpoints
from mutor_img.checkpoints.folder import find_checkpoint, newest_intact, read_meta, read_tensors
from mutor_img.checkpoints.llamagen import read_pt
from mutor_img.checkpoints.loading import load_run
from mutor_img.checkpoints.tensor_files import Slice, write_groups
from mutor_img.common.files import append_line, read_json, read_lines, sealed, write_atomic, write_sealed
from mutor_img.common.images import read_image, write_png
from mutor_img.data.store import Codes
from mutor_img.metrics.digits import load_digits
from mutor_img.metrics.image_sets import read_all
from mutor_img.metrics.references import open_reference
from mutor_img.metrics.samples import open_samples
from mutor_img.sampling.archive import FORMAT, open_archive
from mutor_img.study import pipeline
from mutor_img.study.comparison.pool import Budget
from mutor_img.sweep import points
from mutor_img.training import trackers
from mutor_img.training.runtime import Runtime
from tokenizer.encode import encode_images
from tokenizer.images.crops import center_rule
from tokenizer.images.layouts import open_images
from tokenizer.loading import load_tokenizer
from tokenizer.store import Recipe, StoreWriter

_HEADER = 512  # bytes
LINES = "lines.jsonl"  # whose end, where it is lost, is done again
_KEY = {"weights": "0" * 64, "samples": 1000}  # of what a study and a sweep keep
_SAMPLES = {"format": FORMAT, "num_samples": 70, "seed": 0}


def _run(folder: Path) -> dict[str, Any]:
    checkpoint = find_checkpoint(folder)
    loaded = load_run(folder)
    return {"meta": read_meta(checkpoint), "ema": loaded.model.state_dict(),
            **{group: read_tensors(checkpoint, group) for group in ("model", "optimizer")}}


def _codes(folder: Path) -> list[Any]:
    codes = Codes(folder)
    codes.verify()
    return [codes.codes, codes.labels, codes.info.to_json(), read_json(folder / "encode.json")]


def _samples(path: Path) -> list[Any]:
    found = open_samples(path)
    return [read_all(found), found.labels, found.manifest]


def _reference(path: Path) -> list[Any]:
    found = open_reference(path)
    return [found.role, found.name, found.pool.mu, found.pool.sigma, found.pool.count, found.pool_features,
            found.network, found.weights_hash, found.stored_size]


def _classifier(folder: Path) -> list[Any]:
    found = load_digits(folder)
    return [found.net.state_dict(), found.class_names]


def _merged_samples(folder: Path) -> list[Any]:
    """Go on from what a kill left: all parts are there, and are only to be joined."""
    archive = open_archive(folder / "s.npz", _SAMPLES)
    for unit in archive.start() or ():
        archive.write(unit, _pixels(len(archive.samples(unit))))
    if not archive.out.is_file():
        archive.merge(np.arange(70), {})
    return _samples(folder / "s.npz")


def _merged_codes(folder: Path) -> list[Any]:
    writer = _writer(folder)
    for part in writer.missing() or ():
        writer.write(part, _grids(len(writer.range(part))), {})
    if not (folder / "out" / "codes.json").is_file():
        writer.merge("vq", (4, 4), 16)
    return _codes(folder / "out")


def _pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), np.uint8)


def _grids(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 16, (count, 1, 16)).astype(np.uint16)


def _writer(folder: Path) -> StoreWriter:
    recipe = Recipe("0" * 64, ("plain",), center_rule().name, 8)
    return StoreWriter(folder / "out", open_images(folder / "images"), recipe)


def _sharded(folder: Path) -> dict[str, Any]:
    """Return what a run of two processes left: each has a row of every matrix."""
    return read_tensors(find_checkpoint(folder), "model")


def _kept(path: Path) -> Any:
    return pipeline._kept(path, _KEY, lambda: "computed again")


# kind: what reads it, and which of its files may rot
READERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "checkpoint": (_run, "checkpoints/step_00000002/*"),
    "tokenizer": (lambda path: load_tokenizer(path).state_dict(), "checkpoints/step_*/*"),
    "codes": (_codes, "*"),
    "samples.npz": (_samples, ""),
    "samples folder": (_samples, "*"),
    "parts of samples": (_merged_samples, "s.npz.parts/*"),
    "parts of codes": (_merged_codes, "out/parts/*"),
    "reference.npz": (_reference, ""),
    "classifier": (_classifier, "*"),
    "checkpoint of two processes": (_sharded, "*"),
    "weights.pt": (read_pt, ""),
    "image.png": (lambda path: np.asarray(read_image(path)), ""),
    "scores.json": (read_json, ""),
    "study.json": (_kept, ""),
    "sweep.json": (lambda path: points._read(path, _KEY), ""),
    "spent.json": (lambda path: Budget(path, None, now=lambda: 0.0).seconds, ""),
    "trackers.json": (trackers._run_id, ""),
    LINES: (read_lines, ""),
}


def read(kind: str, path: str) -> str:
    """Return a hash of what a command finds in a file or a folder; runs in a fork."""
    torch.set_num_threads(1)
    found = READERS[kind][0](Path(path))
    return json.dumps(found) if kind == LINES else hashlib.sha256(b"".join(_bytes(found))).hexdigest()


def _bytes(value: Any) -> Iterator[bytes]:
    """Yield bytes that tell a value from any other."""
    if isinstance(value, dict):
        value = [[key, value[key]] for key in sorted(value)]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _bytes(item)
    elif isinstance(value, torch.Tensor):
        yield from _bytes(value.numpy())
    elif isinstance(value, np.ndarray):
        yield repr((value.shape, value.dtype)).encode() + value.tobytes()
    else:
        yield repr(value).encode()


def write(folder: Path) -> None:
    """Write a file or a folder of each kind."""
    vq = inputs.write_tokenizer(folder / "tokenizer")
    inputs.write_generator(folder / "checkpoint", vq)
    images = open_images(inputs.write_images(folder / "images"))
    encode_images(vq, images, folder / "codes", runtime=Runtime(torch.device("cpu")), views=("plain",))
    for name in ("samples.npz", "samples folder/"):
        archive = open_archive(f"{folder}/{name}", _SAMPLES)
        for unit in archive.start():
            archive.write(unit, _pixels(len(archive.samples(unit))))
        archive.merge(np.arange(70), {})
    archive = open_archive(folder / "parts of samples" / "s.npz", _SAMPLES)
    for unit in archive.start():
        archive.write(unit, _pixels(len(archive.samples(unit))))
    inputs.write_images(folder / "parts of codes" / "images")
    writer = _writer(folder / "parts of codes")
    for part in writer.missing():
        writer.write(part, _grids(len(writer.range(part))), {})
    inputs.write_reference(folder / "reference.npz")
    inputs.write_classifier(folder / "classifier")
    _write_sharded(folder / "checkpoint of two processes")
    weights = {"model": load_run(folder / "checkpoint").model.state_dict()}
    write_atomic(folder / "weights.pt", lambda aside: torch.save(weights, aside))
    write_png(folder / "image.png", Image.fromarray(_pixels(1)[0]))
    write_sealed(folder / "scores.json", {"fid": 2.5, "recall": 0.625, "num_samples": 1000})
    write_sealed(folder / "study.json", {"key": _KEY, "value": {"fd": 2.5, "recognised": 0.5}})
    point = points.SweepPoint(1.5, 1.0)._asdict()
    write_sealed(folder / "sweep.json", {"key": _KEY, "points": [{**point, "fd": 2.5}]})
    Budget(folder / "spent.json", None, now=lambda: 0.0).note(force=True)
    trackers._run_id(folder / "trackers.json")
    for step in range(20):
        append_line(folder / "lines.jsonl", json.dumps(sealed({"step": step, "loss": step / 3})))


def _write_sharded(folder: Path) -> None:
    folder.mkdir()
    rows, files = torch.randn(2, 8, generator=torch.Generator().manual_seed(4)), {}
    for rank in range(2):
        mine = {"matrix": Slice(rows[rank:rank + 1], rank, 2), "vector": rows[0]}
        files |= write_groups(folder, {"model": mine}, rank, 2)
    write_sealed(folder / "checkpoint.json", {"format": checkpoints.FORMAT, "step": 1, "files": files})


def cases(place: Place) -> list[Case]:
    """Return ``place.count`` cases, the kinds of file in turn."""
    kinds = list(READERS)

    @cache
    def whole() -> dict[str, str]:
        """Write all kinds; returns what is read of each."""
        write(place.folder / "whole")
        return {kind: json.loads(_read(kind, _copy(kind, place), place)["message"]) for kind in kinds}

    def one(number: int) -> str:
        return _spoil(kinds[number % len(kinds)], number, whole(), place)

    return [Case(f"{kinds[number % len(kinds)]} {number}", lambda number=number: one(number))
            for number in range(place.count)]


def _copy(kind: str, place: Place) -> Path:
    """Return a copy of what there is of a kind, in place of the last one."""
    source, target = place.folder / "whole" / kind, place.folder / "rotten" / kind
    shutil.rmtree(place.folder / "rotten", ignore_errors=True)
    target.parent.mkdir(parents=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        for file in source.parent.glob(f"{source.stem}.*"):  # with its manifest
            shutil.copy(file, target.parent)
    return target


def _read(kind: str, path: Path, place: Place) -> dict[str, Any]:
    return place.forks.run("benchmarks.chaos.rot:read", kind, str(path))


def _spoil(kind: str, number: int, whole: dict[str, str], place: Place) -> str:
    draw, path = place.draw(kind, number), _copy(kind, place)
    pattern = READERS[kind][1]
    files = sorted(p for p in (path.glob(pattern) if pattern else path.parent.glob("*")) if p.is_file())
    file = draw.choice(files)
    content = bytearray(file.read_bytes())
    # Half of them near an end: there stand the headers, a small part of most files.
    near = draw.choice((0, max(0, len(content) - _HEADER)))
    at = draw.choice((draw.randrange(len(content)), min(len(content) - 1, near + draw.randrange(_HEADER))))
    if draw.random() < 0.25:
        del content[at:]
        done = f"{file.name} cut off at {at}"
    else:
        content[at] ^= draw.randrange(1, 256)
        done = f"byte {at} of {file.name} is {content[at]}"
    file.write_bytes(content)
    answer = _read(kind, path, place)
    if answer["outcome"] == "returned":
        found = json.loads(answer["message"])
        if found == whole[kind]:
            return "without effect"
        if kind == LINES and whole[kind].startswith(found[:-1]):
            return "the last lines are done again"
        raise Fault(f"{done}: read as something else")
    try:
        message = said_no(answer, place.folder / "rotten")
    except Fault as fault:
        raise Fault(f"{done}: {fault}") from None
    if kind == "checkpoint" and str(newest_intact(path)) not in message:
        raise Fault(f"{done}: the newest intact checkpoint is not named: {message}")
    return "refused"
