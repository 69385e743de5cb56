"""What changes around a command while it works: data files that vanish or become others, permissions, the clock.

A command ends in one line that names the file, or it is not disturbed. When the files are put back, the same command
goes on and leaves the very files of a run that nothing disturbed.
"""

from __future__ import annotations

import ctypes
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.chaos import inputs, numbers
from benchmarks.chaos.case import Case, Fault, Place
from benchmarks.chaos.disks import COMMANDS, begin, compare, hashes
from mutor_img.checkpoints.folder import newest_checkpoint, newest_intact
from mutor_img.common import cli
from mutor_img.training.runtime import Runtime
from tokenizer.encode import encode_images
from tokenizer.images.layouts import open_images
from tokenizer.loading import load_tokenizer

STEPS = 5  # of a training, whose data change after two


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _swap(path: Path) -> None:
    """Put other content of another size into the same file."""
    path.write_bytes(path.read_bytes()[::-1] + b"\0" * 64)


def _overwrite(path: Path) -> None:
    """Put other content of the same size into the same file."""
    path.write_bytes(path.read_bytes()[::-1])


def _replace(path: Path) -> None:
    """Put another file of the same kind under this name, as a program that writes aside does."""
    aside = path.with_name("other")
    if path.suffix == ".png":
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(aside, format="PNG")
    elif path.suffix == ".npy":
        with open(aside, "wb") as file:
            np.save(file, np.load(path)[::-1])
    else:
        write_tar(aside, ["2", "1", "0"])
    os.replace(aside, path)


ACTS: dict[str, Callable[[Path], None]] = {"gone": Path.unlink, "cut off": _cut, "empty": _empty, "swapped": _swap,
                                           "overwritten": _overwrite, "replaced": _replace}


def write_tar(path: Path, keys: list[str]) -> None:
    """Write a tar file of images in WebDataset's layout, in this order."""
    with tarfile.open(path, "w") as tar:
        for key in keys:
            buffer = io.BytesIO()
            Image.fromarray(np.full((8, 8), 60 * int(key), np.uint8)).save(buffer, format="PNG")
            for name, content in ((f"{key}.png", buffer.getvalue()), (f"{key}.cls", key.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


# Images of each layout: the folder, and the file of it that changes.
LAYOUTS = {"folder": ("images", "images/cat/0.png"), "tar": ("tars", "tars/shard.tar")}


def encode(layout: str, act: str | None, folder: str) -> str:
    """List images, change one of their files, and encode them; runs in a fork."""
    torch.set_num_threads(1)
    root = Path(folder)
    images, file = LAYOUTS[layout]
    classes = root / "classes.txt" if layout == "tar" else None

    def work(words: Any) -> None:
        source = open_images(root / images, classes=classes)
        if act is not None:
            ACTS[act](root / file)
        encode_images(load_tokenizer(root / "tokenizer"), source, root / "out", runtime=Runtime(torch.device("cpu")))

    cli.run(work, [])
    return ""


# Trainings that read while they train, and the file of each that changes.
TRAININGS = {"codes": (numbers.GENERATOR, "codes/codes.npy"),
             "labels": (numbers.GENERATOR, "codes/labels.npy"),
             "images": (numbers.TOKENIZER.replace("crop_min: 1.0", "crop_min: 0.9"), "images/cat/0.png")}


def train(kind: str, act: str | None, folder: str) -> str:
    """Train, and change a file of its data on the way, once a checkpoint is there; runs in a fork."""
    torch.set_num_threads(1)
    root = Path(folder)
    text, file = TRAININGS[kind]

    def work(words: Any) -> None:
        trainer = numbers.open_trainer(text, root, root / "out")
        while trainer.step < STEPS:
            if trainer.step == 2 and trainer.saved_step < 2:
                trainer.save()
                if act is not None:
                    ACTS[act](root / file)
            trainer.update()
        trainer.save()

    cli.run(work, [])
    return ""


def without_power(command: str, folder: str) -> str:
    """Run a command of :mod:`~benchmarks.chaos.disks` as a user whom permissions bind, be it root; runs in a fork."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # Linux: version 3, no capabilities
    if ctypes.CDLL(None).capset(header, none):
        raise OSError("capset")
    return _quietly(command, folder)


def with_clock(command: str, folder: str, second: int, by: int) -> str:
    """Run a command while the clock begins at a second and jumps at each look; runs in a fork."""
    ctypes.CDLL(None).clock_jumps(ctypes.c_long(second), ctypes.c_long(by))
    return _quietly(command, folder)


def _quietly(command: str, folder: str) -> str:
    torch.set_num_threads(1)
    cli.run(lambda words: COMMANDS[command](Path(folder)), [])
    return ""


# What may not be read or written, and the mode that it has then: a user's own files, of which the user took rights.
CLOSED = {"encode": {"images/cat/0.png": 0o000, "images/cat": 0o000, "images": 0o000, "out": 0o555,
                     "tokenizer/checkpoints/step_00000001/model.safetensors": 0o000,
                     "tokenizer/checkpoints/step_00000001/checkpoint.json": 0o000, "tokenizer": 0o000},
          "sample": {"out": 0o555, "generator/checkpoints/step_00000002/ema.safetensors": 0o000,
                     "generator/checkpoints/step_00000002/checkpoint.json": 0o000, "generator/checkpoints": 0o000},
          "checkpoint": {"out": 0o555, "out/checkpoints": 0o555}}
# Where the clock begins, and by how much it jumps at each look.
CLOCKS = {"goes back by an hour at each look": (2 * 10**9, -3600), "stands at 1970": (0, 0),
          "goes forward by a day at each look": (10**9, 86_400), "is in 2100": (4_102_444_800, 1)}


def cases(place: Place) -> list[Case]:
    """Return all cases."""
    root = place.folder
    vq = inputs.write_tokenizer(root / "tokenizer")
    inputs.write_generator(root / "generator", vq)
    images = inputs.write_images(root / "images")
    (root / "tars").mkdir()
    write_tar(root / "tars" / "shard.tar", ["0", "1", "2"])
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in inputs.CLASSES))
    encode_images(vq, open_images(images), root / "codes", runtime=Runtime(torch.device("cpu")))
    whole = cache(partial(_whole, place))
    found = [Case(f"encoding of a {layout}, file {act}", lambda a=(layout, act): _encode(*a, place, whole))
             for layout in LAYOUTS for act in ACTS]
    found += [Case(f"training on {kind}, file {act}", lambda a=(kind, act): _train(*a, place, whole))
              for kind in TRAININGS for act in ACTS]
    found += [Case(f"{command}, {path} has mode {mode:03o}", lambda a=(command, path, mode): _close(*a, place, whole))
              for command, paths in CLOSED.items() for path, mode in paths.items()]
    return found + [Case(f"{command}, the clock {clock}", lambda a=(command, clock): _clock(*a, place, whole))
                    for command in COMMANDS for clock in CLOCKS]


@contextmanager
def _put_back(path: Path, root: Path):
    """Leave a file as it was, with its times."""
    kept = root / "kept"
    shutil.copy2(path, kept)
    try:
        yield
    finally:
        os.replace(kept, path)


def _whole(place: Place, function: str, *arguments: Any) -> dict[str, str]:
    """Return the files of a run that nothing disturbs."""
    begin(arguments[0], place.folder)
    _goes_on(place.forks.run(f"{__name__}:{function}", *arguments, str(place.folder)))
    return _results(place.folder)


def _results(root: Path) -> dict[str, str]:
    """Return the hashes of what a command leaves, but for what says when and on how many tries it was made."""
    return {name: digest for name, digest in hashes(root / "out").items()
            if name.endswith((".npy", ".npz", ".safetensors", "codes.json", "encode.json"))}


def _encode(layout: str, act: str, place: Place, whole: Callable) -> str:
    root, file, wanted = place.folder, place.folder / LAYOUTS[layout][1], whole("encode", layout, None)
    shutil.rmtree(root / "out", ignore_errors=True)
    with _put_back(file, root):
        outcome = _ended(place.forks.run(f"{__name__}:encode", layout, act, str(root)), file)
        if (root / "out" / "codes.json").exists() and outcome != "not disturbed":
            raise Fault("a code store of changed images is there")
    _goes_on(place.forks.run(f"{__name__}:encode", layout, None, str(root)))
    compare(_results(root), wanted)
    return outcome


def _train(kind: str, act: str, place: Place, whole: Callable) -> str:
    root, file, wanted = place.folder, place.folder / TRAININGS[kind][1], whole("train", kind, None)
    shutil.rmtree(root / "out", ignore_errors=True)
    with _put_back(file, root):
        outcome = _ended(place.forks.run(f"{__name__}:train", kind, act, str(root)), file)
        if newest_intact(root / "out") != newest_checkpoint(root / "out"):
            raise Fault("the newest checkpoint is not whole")
    _goes_on(place.forks.run(f"{__name__}:train", kind, None, str(root)))
    compare(_results(root), wanted)
    return outcome


def _close(command: str, closed: str, mode: int, place: Place, whole: Callable) -> str:
    root, path, wanted = place.folder, place.folder / closed, whole("without_power", command)
    begin(command, root)
    (root / "out").mkdir(exist_ok=True)
    former = path.stat().st_mode & 0o777
    path.chmod(mode)
    try:
        outcome = _ended(place.forks.run(f"{__name__}:without_power", command, str(root)), path)
    finally:
        path.chmod(former)
    _goes_on(place.forks.run(f"{__name__}:without_power", command, str(root)))
    compare(_results(root), wanted)
    return outcome


def _clock(command: str, clock: str, place: Place, whole: Callable) -> str:
    wanted = whole("without_power", command)
    begin(command, place.folder)
    _goes_on(place.forks.run(f"{__name__}:with_clock", command, str(place.folder), *CLOCKS[clock]))
    compare(_results(place.folder), wanted)
    return "not disturbed"


def _ended(answer: dict[str, Any], path: Path) -> str:
    """Return how a command took a change: it was not disturbed, or said so in one line that names the file."""
    if answer["outcome"] == "returned":
        return "not disturbed"
    lines = [line for line in answer["printed"].replace("\r", "\n").splitlines() if line.startswith("error: ")]
    if answer["message"] != "status 2" or len(lines) != 1 or "Traceback" in answer["printed"]:
        raise Fault(f"{answer['outcome']}: {answer['message']}: {answer['printed'][-500:]}")
    if str(path) not in answer["printed"]:
        raise Fault(f"{path} is not named: {answer['printed'][-500:]}")
    return "one line"


def _goes_on(answer: dict[str, Any]) -> None:
    if answer["outcome"] != "returned":
        raise Fault(f"when all is well: {answer['message']}: {answer['printed'][-500:]}")
