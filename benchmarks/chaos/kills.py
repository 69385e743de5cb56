"""Kills at random moments: SIGKILL and SIGTERM, of each command that goes on where it was stopped.

At the moment of the kill every file under its final name is whole. The same command, run again, leaves the very bytes
of a run that nothing disturbed, and no lock or temporary file. On the way nothing is connected to.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from benchmarks.chaos import inputs
from benchmarks.chaos.case import Case, Fault, Place
from mutor_img import blocks
from mutor_img.common import cli
from mutor_img.metrics.digits import main as train_classifier
from mutor_img.pretraining.command import main as train_generator
from mutor_img.sampling.command import main as sample
from mutor_img.training.runtime import Runtime
from tokenizer.encode import encode_images
from tokenizer.encode import main as encode
from tokenizer.images.layouts import open_images
from tokenizer.train import main as train_tokenizer

SIGNALS = (signal.SIGKILL, signal.SIGTERM)
_TRAIN = ("train: {steps: 30, global_batch: 4, precision: fp32, compile: false, ema: 0.9, log_every: 2, keep: 2, "
          "checkpoint_every: 3, validate_every: 0, picture_every: 0}\n")
_GENERATOR = ("data: {{codes: {folder}/codes}}\n"
              "model: {{preset: mnist, grid: [4, 4], vocabulary: 16, classes: 3, dropout: 0.1}}\n{more}" + "{train}")
_TOKENIZER = ("data: {{images: {folder}/large, val_images: {folder}/large, image_size: 16, crop_min: 1.0, "
              "workers: 1}}\n"
              "model: {{preset: mnist, channels: 8, vocabulary: 32, code_dim: 4}}\n"
              "revival: {{after: 2, until: 1.0}}\n"
              "loss: {{adversarial_weight: 0.5, adversarial_start: 2, discriminator_channels: 4, "
              "discriminator_layers: 1}}\n{train}")
_CONFIGS = {"registers": _GENERATOR.replace("{more}", "registers: {{kind: 2d, count: 6, d_max: 3}}\n"),
            "mirai": _GENERATOR.replace("{more}", "registers: {{kind: none}}\nobjective: {{kind: mirai}}\n"),
            "tokenizer": _TOKENIZER}
# What says when, or how fast, a run was: other at each time.
_TIMED = ("checkpoint.json", "classifier.json", "metrics.jsonl", "loss.png")


def _training(main: Callable, name: str) -> Callable[[Path], None]:
    return lambda folder: main(["--config", str(folder / f"{name}.yaml"), f"run_dir={folder}/out/run"])


COMMANDS: dict[str, Callable[[Path], object]] = {
    "train with registers": _training(train_generator, "registers"),
    "train with a teacher": _training(train_generator, "mirai"),
    "train a tokenizer": _training(train_tokenizer, "tokenizer"),
    "encode": lambda folder: encode(["--tokenizer", str(folder / "tokenizer"), "--images", str(folder / "many"),
                                     "--workers", "0", "--out", str(folder / "out" / "codes")]),
    "sample": lambda folder: sample(["--checkpoint", str(folder / "generator"), "--num-samples", "300", "--device",
                                     "cpu", "--out", str(folder / "out" / "s.npz")]),
    "train a classifier": lambda folder: train_classifier([
        "--images", str(folder / "many"), "--val", str(folder / "images"), "--epochs", "3", "--out",
        str(folder / "out" / "classifier")]),
}


def work(command: str, folder: str) -> None:
    """Run a command as a user does, with small models; runs in a fork."""
    torch.set_num_threads(1)
    blocks.PRESETS["mnist"] = (2, 2, 16)
    cli.run(lambda words: COMMANDS[command](Path(folder)), [])


def prepare(folder: Path) -> None:
    """Write what the commands read."""
    vq = inputs.write_tokenizer(folder / "tokenizer")
    inputs.write_generator(folder / "generator", vq)
    inputs.write_images(folder / "large", side=16)
    images = inputs.write_images(folder / "images")
    inputs.write_images(folder / "many", count=300)
    encode_images(vq, open_images(images), folder / "codes", runtime=Runtime(torch.device("cpu")))
    for name, text in _CONFIGS.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder, train=_TRAIN))


def cases(place: Place) -> list[Case]:
    """Return ``place.count`` cases, commands and signals in turn."""
    prepare(place.folder)
    names, undisturbed = list(COMMANDS), {}

    def one(number: int) -> str:
        command = names[number % len(names)]
        if command not in undisturbed:
            begun = time.monotonic()
            _finish(command, place)
            undisturbed[command] = time.monotonic() - begun, _results(place.folder / "out")
        return _kill(command, number, *undisturbed[command], place)

    return [Case(f"{names[number % len(names)]}, {SIGNALS[number // len(names) % 2].name} {number}",
                 lambda number=number: one(number)) for number in range(place.count)]


def _finish(command: str, place: Place) -> None:
    """Run a command to its end."""
    answer = place.forks.run(f"{__name__}:work", command, str(place.folder))
    if answer["outcome"] != "returned":
        raise Fault(f"{answer['outcome']}: {answer['message']}; {answer['printed'][-300:]}")
    if "socket.connect" in answer["acts"]:
        raise Fault("it connected to something")


def _kill(command: str, number: int, seconds: float, whole: dict[str, str], place: Place) -> str:
    out, draw = place.folder / "out", place.draw(command, number)
    shutil.rmtree(out)
    signal_number, kills = SIGNALS[number // len(COMMANDS) % 2], 0
    for _ in range(draw.choice((1, 1, 2))):
        answer = place.forks.run(f"{__name__}:work", command, str(place.folder),
                                 kill=(draw.uniform(0.02, 1.0) * seconds, signal_number))
        kills += answer["outcome"] != "returned"
        for path in _final(out):
            _open(path)
    _finish(command, place)
    if (now := _results(out)) != whole:
        different = sorted(name for name in {*now, *whole} if now.get(name) != whole.get(name))
        raise Fault(f"run again, it leaves other files: {', '.join(different)}")
    return "the same bytes" if kills else "ended before the kill"


def _final(out: Path) -> list[Path]:
    """Return the files under their final names: neither hidden nor in the folder of parts of something unfinished."""
    return [path for path in out.rglob("*") if path.is_file() and not any(
        part.startswith(".") or part in ("parts", "s.npz.parts") for part in path.relative_to(out).parts)]


def _open(path: Path) -> None:
    """Read a file to its end by what its name says it is.

    Raises:
        Fault: it is not whole.
    """
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None
        elif path.suffix == ".npy":
            np.load(path, mmap_mode="r")
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (safe_open is no mapping)
        elif path.suffix == ".png":
            Image.open(path).load()
    except Exception as error:
        raise Fault(f"{path.name} was there and not whole at the kill: {error}") from None


def _results(out: Path) -> dict[str, str]:
    """Return the hashes of all files, hidden ones too; "there" for what says when it was made."""
    return {str(path.relative_to(out)): "there" if path.name in _TIMED else
            hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*")) if path.is_file() and "tensorboard" not in path.parts}
