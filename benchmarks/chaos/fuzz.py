"""Files of every kind that a command reads, changed at random: each is read, or refused in one line that names it.

Whole files are changed at a few places (``mutation.py``) and read one after another in a fork, under a limit of memory
and an alarm. An input is a function of the seed, its kind and its number.
"""

from __future__ import annotations

import io
import json
import signal
import tarfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.chaos import inputs, rot
from benchmarks.chaos.case import Case, Fault, Place
from benchmarks.chaos.mutation import changed, changed_json, with_png_sums
from mutor_img.checkpoints.llamagen import read_pt
from mutor_img.checkpoints.loading import load_run
from mutor_img.checkpoints.tensor_files import TensorGroup
from mutor_img.common.cli import one_line
from mutor_img.common.config import field_names, load_config
from mutor_img.common.errors import UserError
from mutor_img.common.files import file_hash, read_json, read_metrics, write_json
from mutor_img.common.images import read_image
from mutor_img.common.shipped import PACKAGED
from mutor_img.data.store import Codes
from mutor_img.metrics.digits import load_digits
from mutor_img.metrics.image_sets import read_all
from mutor_img.metrics.references import open_reference
from mutor_img.metrics.samples import label_rule, open_samples
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.sampling.labels import readable_names
from mutor_img.sampling.pictures import verified_tokenizer
from mutor_img.study.comparison.config import ComparisonConfig
from mutor_img.study.config import StudyConfig
from tokenizer.code_sets import open_json_lines
from tokenizer.images.layouts import open_images
from tokenizer.images.source import read_class_list
from tokenizer.images.webdataset import list_tars
from tokenizer.loading import load_tokenizer
from tokenizer.training.config import TokenizerConfig

BOUND = 256 * 2**20  # bytes
IMAGE_BOUND = 2**30  # an image of 2^26 pixels is allowed, and takes 4 bytes for each of them, before and after
PATIENCE = 10.0  # seconds that one input may take
BATCH = 500  # inputs that one fork reads
_NO_MEMORY = ("MemoryError", "allocate memory")  # how a reader says that it ran into the limit
_CONFIGS = {"generator": (GeneratorConfig, "mnist/mutor2d"), "tokenizer": (TokenizerConfig, "mnist/tokenizer"),
            "study": (StudyConfig, "mnist/study"), "comparison": (ComparisonConfig, "imagenet256/study")}
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF", "AVIF", "JPEG2000")


class Target(NamedTuple):
    """A kind of file.

    Attributes:
        file: which is changed, below a folder that holds one of each kind.
        read: reads it as a command does, given that folder.
        share: how many of the inputs are of this kind, in proportion: a quick reader gets more.
        json: it is JSON, whose values are changed too.
        words: what a message may name in place of the file.
        bound: bytes of address space that reading may take, beyond what the process has.
    """

    file: str
    read: Callable[[Path], Any]
    share: int
    json: bool = False
    words: tuple[str, ...] = ()
    bound: int = BOUND


def _weights(folder: Path) -> Any:
    path = folder / "checkpoint/checkpoints/step_00000001/model.safetensors"
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}}  # as a stranger would write them
    return TensorGroup(path.parent, files, "model").read_all()


def _generator(folder: Path) -> Any:
    found = load_run(folder / "checkpoint")
    names = readable_names(found.codes.get("class_names"), found.model.config.classes)
    tokenizer = verified_tokenizer(found.codes, "cpu", found.model.config, found.path / "checkpoint.json")
    return found.trained_offsets, names, tokenizer.grid_for(tokenizer.image_size)


def _samples(path: Path) -> Any:
    found = open_samples(path)
    return read_all(found), label_rule(found, len(found))


def _config(kind: str) -> Target:
    schema, _ = _CONFIGS[kind]
    return Target(f"{kind}.yaml", lambda folder: load_config(schema, folder / f"{kind}.yaml"), 2,
                  words=tuple(name.rpartition(".")[2] for name in field_names(schema)))


TARGETS: dict[str, Target] = {
    **{f"{kind} config": _config(kind) for kind in _CONFIGS},
    "generator's checkpoint.json": Target("checkpoint/checkpoints/step_00000002/checkpoint.json",
                                          _generator, 5, json=True),
    "tokenizer's checkpoint.json": Target("tokenizer/checkpoints/step_00000001/checkpoint.json",
                                          lambda folder: load_tokenizer(folder / "tokenizer"), 5, json=True),
    "safetensors": Target("checkpoint/checkpoints/step_00000001/model.safetensors", _weights, 50),
    "pt": Target("c2i.pt", lambda folder: read_pt(folder / "c2i.pt"), 40),
    "samples.npz": Target("samples.npz", lambda folder: _samples(folder / "samples.npz"), 60),
    "samples.json": Target("samples.json", lambda folder: _samples(folder / "samples.npz"), 10, json=True),
    "labels.json": Target("samples folder/labels.json", lambda folder: open_samples(folder / "samples folder"), 5,
                          json=True),
    "reference.npz": Target("reference.npz", lambda folder: open_reference(folder / "reference.npz"), 60),
    "class list": Target("classes.txt", lambda folder: read_class_list(folder / "classes.txt"), 100),
    "label file": Target("labels.csv", lambda folder: open_images(folder / "flat", labels=folder / "labels.csv"), 60),
    "label file of numbers": Target("numbers.txt", lambda folder: open_images(
        folder / "flat", labels=folder / "numbers.txt", classes=folder / "classes.txt"), 60),
    **{f"image, {form}": Target(f"image.{form}", lambda folder, form=form: read_image(folder / f"image.{form}"), 60,
                                bound=IMAGE_BOUND)
       for form in _FORMATS},
    "codes.json": Target("codes/codes.json", lambda folder: Codes(folder / "codes").verify(), 20, json=True),
    "codes.npy": Target("codes/codes.npy", lambda folder: Codes(folder / "codes").verify(), 20),
    "labels.npy": Target("codes/labels.npy", lambda folder: Codes(folder / "codes").verify(), 20),
    "tar": Target("tars/shard.tar", lambda folder: list_tars(
        [folder / "tars/shard.tar"], inputs.CLASSES).read(0, "RGB"), 60),
    "classifier.json": Target("classifier/classifier.json", lambda folder: load_digits(folder / "classifier"), 10,
                              json=True),
    "metrics.jsonl": Target("run/metrics.jsonl", lambda folder: read_metrics(folder / "run"), 60),
    "codes of others": Target("ten_crops.jsonl", lambda folder: list(open_json_lines(
        folder / "ten_crops.jsonl", inputs.CLASSES).labels), 60),
}


def write(folder: Path) -> None:
    """Write a file of each kind, JSON without the seal that a stranger would leave out."""
    rot.write(folder)
    for target in TARGETS.values():
        if target.json:
            write_json(folder / target.file, read_json(folder / target.file))
    for kind, (_, name) in _CONFIGS.items():
        (folder / f"{kind}.yaml").write_bytes((PACKAGED / f"{name}.yaml").read_bytes())
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in inputs.CLASSES))
    inputs.write_images(folder / "flat", count=3)
    images = sorted((folder / "flat").glob("*/*.png"))
    (folder / "labels.csv").write_text("".join(f"{path.name},{path.parent.name}\n" for path in images))
    (folder / "numbers.txt").write_text("".join(f"{path.stem} {place}\n" for place, path in enumerate(images)))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for form in _FORMATS:
        Image.fromarray(pixels).save(folder / f"image.{form}", format=form)
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "shard.tar", "w") as tar:
        for place, path in enumerate(images):
            for name, content in ((f"{place}.png", path.read_bytes()), (f"{place}.cls", b"%d" % place)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    torch.serialization.set_crc32_options(False)  # without checksums, which would keep readers from what is changed
    torch.save({"model": load_run(folder / "checkpoint").model.state_dict()}, folder / "c2i.pt")
    torch.serialization.set_crc32_options(True)
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(5)))
    (folder / "ten_crops.jsonl").write_text('{"class_id": 1, "tokens": [1, 2, 3, 4]}\n' * 20)


def attempt(name: str, first: int, count: int, seed: int, folder: str) -> dict[str, Any]:
    """Read some inputs of a kind; returns how many were ``refused``, and the ``fault`` at which it ended, if any.

    Runs in a fork.
    """
    target, root, refused = TARGETS[name], Path(folder), 0
    path, others = root / target.file, _others(name, root)
    content = path.read_bytes()
    signal.signal(signal.SIGALRM, _ring)
    warnings.simplefilter("ignore")  # Pillow's, of what it passes over
    for number in range(first, first + count):
        draw = Random(f"{seed} {name} {number}")
        whole = changed_json(content, draw) if target.json and draw.random() < 0.7 else changed(content, draw, others)
        if name.endswith("PNG"):
            whole = with_png_sums(whole)
        path.write_bytes(whole)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        try:
            target.read(root)
        except (UserError, OSError) as error:  # commands say such an error in one line, too, if it names a file
            refused += 1
            named = isinstance(error, OSError) and error.filename
            fault = None if named else _wrong(one_line(str(error)), root, target)
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            fault = f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
        else:
            fault = None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if fault:
            return {"refused": refused, "fault": f"input {number}: {fault}; it is {whole[:400]!r}"}
    return {"refused": refused, "fault": None}


def _others(name: str, root: Path) -> list[bytes]:
    """Return files of the same sort, whose parts may stand in the changed one."""
    sort = name.partition(" ")[0] if name.startswith("image") else name.rpartition(".")[2]
    alike = [other for other in TARGETS if other.startswith(sort) or other.endswith(sort)]
    return [(root / TARGETS[other].file).read_bytes() for other in alike]


class _Hangs(BaseException):
    """It took longer than ``PATIENCE``; no reader's ``except Exception`` holds it up."""


def _ring(number: int, frame: Any) -> None:
    raise _Hangs(f"more than {PATIENCE:g} s")


def _wrong(message: str, root: Path, target: Target) -> str | None:
    """Return what is wrong with a refusal, or None."""
    if any(sign in message for sign in _NO_MEMORY):
        return f"wanted more than {target.bound // 2**20} MiB: {message[:300]}"
    if str(root) not in message and not any(word in message for word in target.words):
        return f"a message that names nothing: {message[:300]}"
    return None


def cases(place: Place) -> list[Case]:
    """Return cases of ``BATCH`` inputs or fewer, ``place.count`` inputs in all, shared out among the kinds."""
    write(place.folder)
    total = sum(target.share for target in TARGETS.values())
    found = []
    for name, target in TARGETS.items():
        count = max(1, round(place.count * target.share / total))
        for first in range(0, count, BATCH):
            size = min(BATCH, count - first)
            found.append(Case(f"{name}, {size} inputs from {first}",
                              lambda a=(name, first, size): _try(*a, place)))
    return found


def _try(name: str, first: int, count: int, place: Place) -> str:
    path = place.folder / TARGETS[name].file
    whole = path.read_bytes()
    try:
        answer = place.forks.run(f"{__name__}:attempt", name, first, count, place.seed, str(place.folder),
                                 memory=TARGETS[name].bound)
        if answer["outcome"] != "returned":
            raise Fault(f"{answer['outcome']}: {answer['message']}; it is {path.read_bytes()[:400]!r}")
        if answer["acts"]:
            raise Fault(f"it did something: {', '.join(answer['acts'])}")
    finally:
        path.write_bytes(whole)
    found = json.loads(answer["message"])
    if found["fault"]:
        raise Fault(found["fault"])
    return f"held, {found['refused']} of {count} refused"
