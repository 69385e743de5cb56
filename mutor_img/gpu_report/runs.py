"""Checks of whole runs: one that is resumed ends where it ended before, and one that does everything on its way."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mutor_img.checkpoints.folder import find_checkpoint, read_meta, read_tensors, write_checkpoint
from mutor_img.common.files import file_hash, read_json, read_metrics, write_json
from mutor_img.gpu_report.images import CLASSES, JUDGED, SIZE, tokenizer_run, write_images
from mutor_img.gpu_report.place import CheckFailed, Place, draw_convolutions, relative
from mutor_img.gpu_report.training import EMA, SmallConfig, small_run
from mutor_img.metrics.digits import ABOUT_FILE, WEIGHTS_FILE, DigitNet
from mutor_img.pretraining.config import CodesConfig, EvalConfig
from mutor_img.pretraining.rehearsal import random_task
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.registers import RegisterLaw
from mutor_img.training.loop import train
from mutor_img.training.task import Task
from tokenizer.encode import encode_images
from tokenizer.images.folder import list_images
from tokenizer.loading import load_tokenizer
from tokenizer.network.vq import VQModel
from tokenizer.train import TokenizerTask

# Of the way that the last two updates went. Adam makes whole steps of the signs of gradients near 0, which may differ
# where kernels sum in no fixed order: a few hundredths. Whatever a resume forgets is nearer to 1.
APART = 0.25
# Biases of attention's keys: softmax does not see what all scores have in common, so their gradients are rounding
# alone, and Adam makes whole steps of it.
UNSEEN = ".k.bias"
MEASURED = ("loss", "val_next_token", "eval_fd", "eval_recall")


def check_resume(place: Place, law: RegisterLaw, precision: str, checkpointing: bool = False) -> str:
    """A generator's run with dropout and EMA, resumed after half of its updates, against the run in one go."""
    with tempfile.TemporaryDirectory() as folder:
        config = small_run(Path(folder), law, precision, True, model={"dropout": 0.1},
                           train={"ema": EMA, "activation_checkpointing": checkpointing})
        return resumed(place, config, random_task, Path(folder))


def check_tokenizer_resume(place: Place, precision: str) -> str:
    """A tokenizer's run with a discriminator, revived codes and EMA, likewise."""
    loss = replace(JUDGED, entropy=0.1)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images")
        config = tokenizer_run(Path(folder), precision, True, loss, {"ema": EMA})
        return resumed(place, config, TokenizerTask, Path(folder))


def resumed(place: Place, config: Any, task: Callable[..., Task], root: Path) -> str:
    """Train a run of four updates, and go on once more from its middle; both are to end with the same tensors.

    Kernels that sum in no fixed order (the backward pass of fused attention) may part them a little. What a resume has
    lost parts them by as much as an update moves: masks of dropout, moments, an average, an order. Of weights without
    any effect (:data:`UNSEEN`) it is only counted whether their bytes are the same.

    Args:
        place: where.
        config: of the run; its folder is another one.
        task: makes a task of config and runtime.
        root: a folder of its own.

    Raises:
        CheckFailed: they end more than ``APART`` of the way of the last two updates from each other.
    """
    config = replace(config, train=replace(config.train, steps=4, checkpoint_every=2))
    for run in ("whole", "parts"):
        config.run_dir = str(root / run)
        train(task(config, place.runtime), config, place.runtime)
        if run == "whole":
            whole = find_checkpoint(root / run)
            middle = shutil.copytree(whole.with_name("step_00000002"), root / "parts" / "checkpoints" / "step_00000002")
    parts = find_checkpoint(root / "parts")
    groups = sorted({name.split(".")[0] for name in read_meta(whole)["files"]})
    wrong, same, count, worst = [], 0, 0, 0.0
    for group in groups:
        one, two, half = (read_tensors(folder, group) for folder in (whole, parts, middle))
        for name in one:
            count, same = count + 1, same + torch.equal(one[name], two[name])
            if name.endswith(UNSEEN):
                continue
            share = relative(two[name], one[name], one[name].double() - half[name].double())
            worst = max(worst, share)
            if not share <= APART:
                wrong.append(f"{group}: {name} of the resumed run is {share:.2f} of the way of two updates from that "
                             "of the run in one go")
    if wrong:
        raise CheckFailed("\n".join(wrong))
    detail = f"{count} tensors in {len(groups)} files ({', '.join(groups)})"
    return f"{detail}, all the same bytes" if same == count else (
        f"{detail}, {count - same} of them not the same bytes, the worst {worst:.1e} of the way of two updates apart")


def check_run(place: Place, law: RegisterLaw) -> str:
    """From images to scores on the device: encode, preflight, train, validate, draw pictures, sample, score."""
    with tempfile.TemporaryDirectory() as folder:
        config = whole_run(place, Path(folder), law)
        trainer = train(GeneratorTask(config, place.runtime), config, place.runtime)
        values = {key: value for row in read_metrics(trainer.run_dir) for key, value in row.items()}
        faults = [f"the run's {key} is {values.get(key, 'absent')}" for key in MEASURED
                  if not math.isfinite(values.get(key, math.nan))]
        if not list((trainer.run_dir / "pictures").glob("samples_*.png")):
            faults.append("the run drew no sample grid")
        if place.on_gpu and (found := read_json(trainer.run_dir / "preflight.json"))["attention"] != "flex":
            faults += ["the run's preflight failed", *found["failures"], found.get("log", "")]
    if faults:
        raise CheckFailed("\n".join(faults))
    return (f"loss {values['loss']:.3f}, held out {values['val_next_token']:.3f}, fd {values['eval_fd']:.4g}"
            + (f", preflight passed in {found['seconds']:.0f} s" if place.on_gpu else ""))


def whole_run(place: Place, folder: Path, law: RegisterLaw) -> SmallConfig:
    """Write what a run needs into ``folder`` (images, tokenizer, codes, classifier); returns the run's config."""
    write_images(folder / "images", channels=1)
    vq = draw_convolutions(VQModel(image_channels=1, channels=8, multipliers=(1, 1, 2), blocks=1, latent_channels=8,
                                   vocabulary=64, groups=4, attention=False))
    write_checkpoint(folder / "tokenizer", 1, {"model": vq.state_dict()},
                     {"kind": "tokenizer", "model": vq.options, "image_size": SIZE}, 1)
    encode_images(load_tokenizer(folder / "tokenizer", place.device), list_images(folder / "images"),
                  folder / "drawn", runtime=place.runtime)
    classifier = folder / "classifier"
    classifier.mkdir()
    save_file(draw_convolutions(DigitNet(side=SIZE)).state_dict(), classifier / WEIGHTS_FILE)
    write_json(classifier / ABOUT_FILE, {"class_names": CLASSES, "image_size": SIZE,
                                         "weights_sha256": file_hash(classifier / WEIGHTS_FILE)})
    config = small_run(folder, law, "bf16", True, train={
        "steps": 2, "ema": EMA, "validate_every": 2, "picture_every": 2})
    config.data = CodesConfig(str(folder / "drawn"), str(folder / "drawn"))
    config.pictures.per_class = 1
    config.eval = EvalConfig(every=2, samples=20, reference=str(folder / "images"), metrics=["fid", "pr"],
                             features="mnist", features_weights=str(classifier))
    return config
