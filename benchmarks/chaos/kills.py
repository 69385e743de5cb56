"""Kills at random moments: SIGKILL and SIGTERM, of each command that goes on where it was stopped.

Half of the moments are drawn from the command's time, half from its calls that write, where a kill can do most. All the
while a watcher opens every file that has its final name. The same command, run again, leaves the very bytes of a run
that nothing disturbed, and no lock or temporary file. What says how long something took is left out of the comparison:
the keys of ``TIMED`` and the seals over them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from benchmarks.chaos import inputs
from benchmarks.chaos.case import Case, Fault, Place
from benchmarks.chaos.steps import Step, be
from benchmarks.chaos.watcher import Watcher
from mutor_img import blocks
from mutor_img.checkpoints.folder import newest_checkpoint
from mutor_img.common.files import read_lines
from mutor_img.training.runtime import Runtime
from tokenizer.encode import encode_images
from tokenizer.images.layouts import open_images

SIGNALS = (signal.SIGKILL, signal.SIGTERM)
TIMED = ("seal", "seconds", "training_seconds", "minutes", "peak_memory_gib", "mfu", "tokens_per_second",
         "images_per_second")
_TRAIN = ("train: {steps: 18, global_batch: 4, precision: fp32, compile: false, ema: 0.9, log_every: 2, keep: 1, "
          "trackers: [], checkpoint_every: 6, validate_every: 6, picture_every: 9}\n")
_GENERATOR = ("data: {codes: FOLDER/codes, val_codes: FOLDER/codes}\n"
              "model: {preset: mnist, grid: [4, 4], vocabulary: 16, classes: 3, dropout: 0.1}\n" + _TRAIN)
_TOKENIZER = ("data: {images: FOLDER/large, val_images: FOLDER/large, image_size: 16, crop_min: 1.0, workers: 1}\n"
              "model: {preset: mnist, channels: 8, vocabulary: 32, code_dim: 4}\n"
              "loss: {adversarial_weight: 0.5, adversarial_start: 2, discriminator_channels: 4, "
              "discriminator_layers: 1}\nrevival: {after: 2, until: 1.0}\n" + _TRAIN)
_NONE = "registers: {kind: none}\n"
_CONFIGS = {
    "registers": _GENERATOR + "registers: {kind: 2d, count: 6, d_max: 3}\n",
    "mirai": _GENERATOR + _NONE + "objective: {kind: mirai}\n",
    "rear": _GENERATOR + _NONE + "objective: {kind: rear, noise_until: 10, code_dim: 4}\n",
    "patches": _GENERATOR + _NONE + "objective: {kind: npp, stage_ends: [10]}\n",
    "heads": _GENERATOR + _NONE + "objective: {kind: parallel-heads, own_output: true}\n",
    "chain": _GENERATOR + _NONE + "objective: {kind: sequential-heads, depths: 2}\n",
    "tokenizer": _TOKENIZER,
}
_STUDY = {
    "tokenizer": _TOKENIZER.replace("FOLDER/large", "FOLDER/digits/train") + "run_dir: FOLDER/out/tokenizer\n",
    "generator": _NONE + _GENERATOR.replace("FOLDER/codes", "FOLDER/out/codes").replace(
        "vocabulary: 16, classes: 3", "vocabulary: 32, classes: 10") + "run_dir: FOLDER/out/generator\n",
    "study": ("run_dir: FOLDER/out/study\nimages: FOLDER/digits\ncodes: FOLDER/out/codes\n"
              "tokenizer: FOLDER/study/tokenizer.yaml\ngenerator: FOLDER/study/generator.yaml\n"
              "samples: 100\nselection_samples: 100\ncfg_scales: [1.0, 2.0]\n"),
}


_FEATURES = " --features classifier --features-weights FOLDER/classifier --device cpu"
_TWO = ("-m torch.distributed.run --standalone --nproc-per-node 2 train.py --config FOLDER/registers.yaml "
        "run_dir=FOLDER/out/run train.picture_every=0")
SHUTDOWN = 20  # seconds that torchrun leaves its processes to end
COMMANDS = {  # as they are typed, after "python"
    **{name: f"{'-m tokenizer.train' if name == 'tokenizer' else 'train.py'} --config FOLDER/{name}.yaml "
             "run_dir=FOLDER/out/run" for name in _CONFIGS},
    "encode": "-m tokenizer.encode --tokenizer FOLDER/vq --images FOLDER/many --workers 0 --out FOLDER/out/codes",
    "sample": "sample.py --checkpoint FOLDER/generator --num-samples 300 --device cpu --out FOLDER/out/s.npz",
    "classifier": "-m mutor_img.metrics.digits --images FOLDER/many --val FOLDER/images --epochs 3 --out FOLDER/out/c",
    "reference": "evaluate_fid.py --make-reference FOLDER/many --role generation --out FOLDER/out/r.npz" + _FEATURES,
    "score": "evaluate_fid.py --checkpoint FOLDER/generator --num-samples 200 --reference FOLDER/many --json "
             "FOLDER/out/scores.json" + _FEATURES,
    "study": "-m mutor_img.study --config FOLDER/study/study.yaml",
    "launcher of two": _TWO,
    "one of two": _TWO,
}


class Kill(NamedTuple):
    """When a signal comes.

    Attributes:
        number: of the signal.
        seconds: after which it comes, or
        call: at which call that writes.
    """

    number: int
    seconds: float | None = None
    call: int | None = None


def work(command: str, folder: str, kill: list[Any] | None = None) -> int:
    """Run a command as a user does, with small models; returns how many calls wrote. Runs in a fork.

    Args:
        command: of ``COMMANDS``.
        folder: with its inputs.
        kill: a :class:`Kill` that this process, or the second of two, brings about itself.
    """
    if command == "one of two":
        Step.begin = staticmethod(lambda: _arm(folder, kill if os.environ["RANK"] == "1" else None))
    else:
        _arm(folder, kill)
    type_in(command, folder)
    library = ctypes.CDLL(None)
    return library.disk_calls() if hasattr(library, "disk_calls") else 0


def type_in(command: str, folder: str, *more: str) -> None:
    """Be a command whose models are small, and that starts others as forks.

    Args:
        command: of ``COMMANDS``.
        folder: with its inputs.
        more: further words.
    """
    torch.set_num_threads(1)
    blocks.PRESETS["mnist"] = (2, 2, 16)
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN)
    Step.log = Path(folder) / "steps.log"
    subprocess.Popen = subprocess_handler.Popen = Step
    be([*COMMANDS[command].replace("FOLDER", folder).split(), *more])


def _arm(folder: str, kill: list[Any] | None) -> None:
    """Have this process get a signal, at a call that writes into the folder of outputs or after a while."""
    number, seconds, call = kill or Kill(signal.SIGKILL)
    library = ctypes.CDLL(None)
    if hasattr(library, "disk_fails"):
        library.disk_fails(str(Path(folder) / "out").encode(), -1 if call is None else call, -number, 1)
    if seconds is not None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()


def prepare(folder: Path) -> None:
    """Write what the commands read."""
    vq = inputs.write_tokenizer(folder / "vq")
    inputs.write_generator(folder / "generator", vq)
    inputs.write_images(folder / "large", side=16)
    images = inputs.write_images(folder / "images")
    inputs.write_images(folder / "many", count=300)
    encode_images(vq, open_images(images), folder / "codes", runtime=Runtime(torch.device("cpu")), views=("plain",))
    inputs.write_classifier(folder / "classifier")
    for name, count in (("train", 40), ("val", 20)):
        _write_digits(folder / "digits" / name, count)
    (folder / "study").mkdir()
    for name, text in _CONFIGS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    for name, text in _STUDY.items():
        (folder / "study" / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))


def _write_digits(folder: Path, count: int) -> None:
    """Write grey PNGs of ten classes, noise around a level of each class's own."""
    draw = np.random.default_rng(count)
    for number in range(count):
        path = folder / str(number % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        level = 20 * (number % 10)
        Image.fromarray(draw.integers(level, level + 60, (16, 16), np.uint8)).save(path)


def cases(place: Place) -> list[Case]:
    """Return ``place.count`` cases, the commands in turn and each with both signals."""
    prepare(place.folder)
    names, undisturbed = list(COMMANDS), {}

    def one(number: int) -> str:
        command = names[number % len(names)]
        if command not in undisturbed:
            shutil.rmtree(place.folder / "out", ignore_errors=True)
            begun = time.monotonic()
            calls = finish(command, place)
            undisturbed[command] = time.monotonic() - begun, calls, results(place.folder / "out")
        return _try(command, number, *undisturbed[command], place)

    return [Case(f"{names[number % len(names)]} {number}", lambda number=number: one(number))
            for number in range(place.count)]


def finish(command: str, place: Place) -> int:
    """Run a command to its end; returns how many calls wrote."""
    (place.folder / "steps.log").unlink(missing_ok=True)
    answer = place.forks.run(f"{__name__}:work", command, str(place.folder))
    if answer["outcome"] != "returned":
        log = place.folder / "steps.log"
        printed = answer["printed"] + (log.read_text() if log.is_file() else "")
        raise Fault(f"{answer['outcome']}: {answer['message']}; {printed[-500:]}")
    return int(answer["message"])


def _try(command: str, number: int, seconds: float, calls: int, whole: dict[str, Any], place: Place) -> str:
    """Kill a command once or twice, run it to its end, and compare."""
    out, draw, kills = place.folder / "out", place.draw(command, number), 0
    shutil.rmtree(out)
    sent = SIGNALS[number // len(COMMANDS) % 2]
    at_calls = calls and draw.random() < 0.5
    with Watcher(out):
        for _ in range(draw.choice((1, 1, 2))):
            kill = Kill(sent, call=draw.randrange(calls)) if at_calls else Kill(sent, draw.uniform(0.02, 1.0) * seconds)
            outside = {} if at_calls or command == "one of two" else {"kill": (kill.seconds, kill.number)}
            answer = place.forks.run(f"{__name__}:work", command, str(place.folder), None if outside else kill,
                                     **outside)
            kills += answer["signalled"] or answer["outcome"] != "returned" or bool(at_calls and not kills)
        finish(command, place)
    if (now := results(out)) != whole:
        different = sorted(name for name in {*now, *whole} if now.get(name) != whole.get(name))
        raise Fault(f"{kill}: run again, it leaves other files: {', '.join(different)}")
    return f"{command}: {sent.name if kills else 'ended before it'}"


def results(out: Path) -> dict[str, Any]:
    """Return what stands in all files, hidden ones too, but for what says when and how fast they were made.

    A checkpoint that was to be removed, and is still there whole, is no fault.
    """
    found = {}
    for path in sorted(out.rglob("*")):
        if not path.is_file() or (path.parent.name.startswith("step_")
                                  and path.parent != newest_checkpoint(path.parents[2])):
            continue
        if path.suffix == ".json":
            content = _timeless(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            content = _timeless(read_lines(path))
        else:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(out))] = content
    return found


def _timeless(value: Any) -> Any:
    """Return a JSON value without what says how long something took."""
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMED}
    return [_timeless(item) for item in value] if isinstance(value, list) else value
