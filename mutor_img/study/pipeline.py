"""The steps of a study. Each is one of the project's commands, printed before it runs, and reuses what is done."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mutor_img.checkpoints.folder import find_checkpoint, newest_checkpoint, read_meta
from mutor_img.checkpoints.loading import Loaded, load_run
from mutor_img.common.child import child_environment, die_with_parent, door_command, module_command
from mutor_img.common.config import load_config
from mutor_img.common.errors import UserError
from mutor_img.common.files import clear, read_record, remove, write_sealed
from mutor_img.common.locks import claim, file_lock
from mutor_img.data.store import Codes
from mutor_img.decoding.guidance import parse_schedule, schedule_text
from mutor_img.decoding.sampler import SamplingSettings
from mutor_img.metrics.digits import load_digits
from mutor_img.metrics.image_sets import FolderImages
from mutor_img.metrics.references import Reference, as_reference
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.sampling.pictures import decode_images
from mutor_img.sampling.source import SampleSource
from mutor_img.study.config import StudyConfig
from mutor_img.study.mnist import prepare_mnist
from mutor_img.sweep.points import grid, sweep
from tokenizer import load_tokenizer
from tokenizer.training.config import TokenizerConfig

CHOSEN = ("cfg_scale", "cfg_schedule", "cfg_parameter")  # what is chosen, by sample.py's names


@dataclass(frozen=True)
class Generator:
    """One generator of the study: its config, overrides and run folder."""

    name: str
    config: str
    run_dir: Path
    overrides: tuple[str, ...] = ()


def command(*arguments: str | Path) -> None:
    """Print one of the project's commands as a user would type it in a clone, and run it from any folder.

    Raises:
        UserError: the command failed; it has said why.
    """
    words = [str(a) for a in arguments]
    print(f"\n$ python {' '.join(words)}", flush=True)
    if words[0] == "-m":
        words = [*module_command(words[1]), *words[2:]]
    elif words[0].endswith(".py"):
        words = [*door_command(words[0].removesuffix(".py")), *words[1:]]
    else:
        words = [sys.executable, *words]
    with subprocess.Popen(words, env=child_environment(), preexec_fn=die_with_parent) as process:
        try:
            status = process.wait()
        except BaseException:  # the study was stopped: training saves when it is told so
            process.terminate()
            process.wait()
            raise
    if status:
        raise UserError(f"the command above ended with status {status}; fix what it says and run the study again")


def check_folders(config: StudyConfig) -> None:
    """Check that tokenizer and generators are trained on the folders that the study prepares and scores by.

    Raises:
        UserError: one of their configs names another folder.
    """
    data = load_config(TokenizerConfig, config.tokenizer).data
    wanted = [("images", config.tokenizer, "data.images", f"{config.images}/train", [data.images])]
    if data.val_images:
        wanted.append(("images", config.tokenizer, "data.val_images", f"{config.images}/val", [data.val_images]))
    for generator in generators(config):
        data = load_config(GeneratorConfig, generator.config, generator.overrides).data
        wanted.append(("codes", generator.config, "data.codes", config.codes, data.folders()))
        if data.val_codes:
            wanted.append(("codes", generator.config, "data.val_codes", f"{config.codes}_val", [data.val_codes]))
    for key, file, name, ours, theirs in wanted:
        if not any(os.path.realpath(ours) == os.path.realpath(folder) for folder in theirs):
            raise UserError(f"{key} is {getattr(config, key)}, but {file} has {name}={theirs[0]} and not {ours}; give "
                            "both the same, in a config of your own")


def prepare(config: StudyConfig) -> None:
    """Make images, tokenizer, codes and digit classifier, as far as they are missing."""
    if prepare_mnist(config.images):
        print(f"wrote {config.images}/train and {config.images}/val")
    train, val = f"{config.images}/train", f"{config.images}/val"
    tokenizer = tokenizer_dir(config)
    command("-m", "tokenizer.train", "--config", config.tokenizer)
    for images, codes in ((train, config.codes), (val, f"{config.codes}_val")):
        command("-m", "tokenizer.encode", "--tokenizer", tokenizer, "--images", images, "--out", codes,
                "--views", "plain")
    command("-m", "mutor_img.metrics.digits", "--images", train, "--val", val, "--out", classifier_dir(config))
    _reconstruct(config)


def _reconstruct(config: StudyConfig) -> None:
    """Encode and decode the held-out images and score what comes out as samples are, unless that is done.

    No generator can be better than its tokenizer: where samples look wrong, these say whether it is at fault.
    """
    tokenizer, images, scores = tokenizer_dir(config), f"{config.images}/val", reconstruction_scores(config)
    key = {"tokenizer_hash": load_tokenizer(tokenizer).hash, "images": images,
           "weights_sha256": load_digits(classifier_dir(config)).weights_hash}
    kept = read_record(scores) if scores.is_file() and reconstruction_picture(config).is_file() else {}
    if all(kept.get(name) == value for name, value in key.items()):
        return
    decoded = Path(config.run_dir) / "reconstructions"
    clear(decoded)
    pixels, judged = (scores.with_name(f"reconstructions_{what}.json") for what in ("pixels", "judged"))
    command("-m", "tokenizer.reconstruct", "--tokenizer", tokenizer, "--images", images,
            "--out", reconstruction_picture(config), "--samples", decoded, "--json", pixels)
    command("evaluate_fid.py", "--samples", decoded, "--reference", f"{config.images}/train", "--features", "mnist",
            "--features-weights", classifier_dir(config), "--json", judged)
    write_sealed(scores, read_record(judged) | read_record(pixels))
    for part in (pixels, judged):
        remove(part)


def tokenizer_dir(config: StudyConfig) -> Path:
    """Return the tokenizer's run folder."""
    return Path(load_config(TokenizerConfig, config.tokenizer).run_dir)


def classifier_dir(config: StudyConfig) -> Path:
    """Return the folder of the digit classifier."""
    return Path(config.run_dir) / "classifier"


def reconstruction_picture(config: StudyConfig) -> Path:
    """Return the path of the before/after picture."""
    return Path(config.run_dir) / "reconstructions.png"


def reconstruction_scores(config: StudyConfig) -> Path:
    """Return the path of the tokenizer's scores."""
    return Path(config.run_dir) / "reconstructions.json"


def generators(config: StudyConfig) -> list[Generator]:
    """Return the generators to train: MuToR, and to compare the baseline for as many updates."""
    chosen = [_generator(config.generator)]
    if config.compare:
        chosen.append(_generator(config.baseline, steps=load_config(GeneratorConfig, config.generator).train.steps))
    return chosen


def _generator(path: str, steps: int | None = None) -> Generator:
    run_dir = Path(load_config(GeneratorConfig, path).run_dir)
    return Generator(run_dir.name, path, run_dir, () if steps is None else (f"train.steps={steps}",))


def equal_seconds(baseline: Generator, other: Generator) -> Generator:
    """Return the baseline once more, for the updates it does in the other's seconds; both are trained."""
    seconds = {g.name: read_meta(find_checkpoint(g.run_dir))["seconds"] for g in (baseline, other)}
    updates = read_meta(find_checkpoint(baseline.run_dir))["step"]
    run_dir = baseline.run_dir.with_name(f"{baseline.run_dir.name}_equal_seconds")
    done = newest_checkpoint(run_dir)
    # A second timing would give another number: what was decided once stays.
    steps = (read_meta(done)["config"]["train"]["steps"] if done
             else max(updates, round(updates * seconds[other.name] / seconds[baseline.name])))
    return Generator(run_dir.name, baseline.config, run_dir, (f"train.steps={steps}", f"run_dir={run_dir}"))


def train_generator(generator: Generator) -> None:
    """Train, or go on, or find it done."""
    command("train.py", "--config", generator.config, *generator.overrides)


def score_generator(config: StudyConfig, generator: Generator, reference: Reference) -> dict[str, Any]:
    """Choose the guidance, sample with it, and score; returns what the table shows.

    The guidance with the lowest Frechet distance is chosen, over ``selection_samples`` of ``selection_seed``; the
    scores are those of ``samples`` others, of ``seed``. They are kept in the run folder and reused while weights,
    classifier and settings are the same.
    """
    loaded, network = load_run(generator.run_dir), load_digits(classifier_dir(config))
    key = {"weights": loaded.weights_hash, "features": network.weights_hash,
           "images": config.images, "samples": config.samples, "seed": config.seed,
           "selection_samples": config.selection_samples, "selection_seed": config.selection_seed,
           "cfg_scales": config.cfg_scales, "cfg_schedules": config.cfg_schedules, "top_p": config.top_p}
    kept = generator.run_dir / "study.json"
    with claim(file_lock(kept)):  # studies may share a generator
        selection = _kept(generator.run_dir / "guidance.json", key,
                          lambda: score_guidance(config, loaded, reference, network))
        best = min(selection, key=lambda row: row.get("fd", 0.0))  # one choice alone has no scores
        settings = {name: best[name] for name in CHOSEN} | {"top_p": config.top_p}
        # sample.py goes on with samples of its settings only
        if kept.is_file() and read_record(kept, "key")["key"] != key:
            for name in ("samples.npz", "samples.json", "study.json"):
                clear(generator.run_dir / name)
        scores = _kept(kept, key, lambda: _score_samples(config, generator, loaded, settings))
        shown = settings if config.grid_top_p is None else settings | {"top_p": config.grid_top_p}
        _kept(generator.run_dir / "grid.json", {**key, "shown": shown}, lambda: _draw_grid(config, generator, shown),
              generator.run_dir / "samples.png")
    meta = read_meta(find_checkpoint(generator.run_dir))
    return {**scores, "updates": meta["step"], "training_seconds": meta["seconds"], **settings, "selection": selection}


def _kept(path: Path, key: dict[str, Any], work: Callable[[], Any], picture: Path | None = None) -> Any:
    """Return what ``work()`` gave when it was done under the same key, else do it and keep it.

    A ``picture`` that it drew must be there, too.
    """
    if path.is_file() and (picture is None or picture.is_file()):
        kept = read_record(path, "key", "value")
        if kept["key"] == key:
            return kept["value"]
    value = work()
    write_sealed(path, {"key": key, "value": value})
    return value


def _score_samples(config: StudyConfig, generator: Generator, loaded: Loaded, settings: dict[str, Any]
                   ) -> dict[str, Any]:
    """Sample, score, and count the copies."""
    samples, scores = generator.run_dir / "samples.npz", generator.run_dir / "scores.json"
    command("sample.py", "--checkpoint", generator.run_dir, "--num-samples", config.samples, *_flags(settings),
            "--seed", config.seed, "--out", samples)
    command("evaluate_fid.py", "--samples", samples, "--reference", f"{config.images}/train", "--features", "mnist",
            "--features-weights", classifier_dir(config), "--held-out", f"{config.images}/val", "--json", scores)
    result = read_record(scores)
    training, held_out = (codes_of(Codes(folder)) for folder in (config.codes, f"{config.codes}_val"))
    # The npz that others read holds no codes. Decoding the training set's is cheaper than drawing the samples' again.
    # On CPUs equal codes are decoded to equal bytes; on a GPU, where sample.py used it, up to the rounding of kernels.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoded = decode_images(load_tokenizer(loaded.codes["tokenizer"], device), training, loaded.model.config.grid)
    result["same_codes"] = repeated(np.load(samples)["arr_0"], decoded)
    result["real_against_real"]["same_codes"] = repeated(held_out.numpy(), training.numpy())
    return result


def _draw_grid(config: StudyConfig, generator: Generator, settings: dict[str, Any]) -> None:
    """Draw ten samples of each class; other images than those that are scored."""
    command("sample.py", "--checkpoint", generator.run_dir, "--num-samples", 100, "--classes", "0,1,2,3,4,5,6,7,8,9",
            *_flags(settings), "--seed", config.seed, "--grid", generator.run_dir / "samples.png")


def _flags(settings: dict[str, Any]) -> list[Any]:
    """Return settings of samples as sample.py's flags and their values."""
    return [word for name, value in settings.items() if value is not None
            for word in (f"--{name.replace('_', '-')}", value)]


def codes_of(store: Codes) -> Tensor:
    """Return the codes (images, N) int64 of a store's first view."""
    numbers = np.arange(len(store))
    return store.batch(numbers, numbers * 0)[0]


def repeated(rows: np.ndarray, known: np.ndarray) -> int:
    """Return how many of ``rows`` stand in ``known``, of the same type, to the byte: images learnt by heart."""
    seen = {row.tobytes() for row in known}
    return sum(row.tobytes() in seen for row in rows)


def score_guidance(config: StudyConfig, loaded: Loaded, reference: Reference, network) -> list[dict[str, Any]]:
    """Return a row for each guidance scale and schedule; where there are several to choose from, with its scores."""
    points = grid(config.cfg_scales, [1.0], [parse_schedule(word) for word in config.cfg_schedules])
    if len(points) == 1:
        return [{name: getattr(points[0], name) for name in CHOSEN}]
    settings = SamplingSettings(top_p=config.top_p, seed=config.selection_seed)
    source = SampleSource(loaded, load_tokenizer(loaded.codes["tokenizer"]), settings, "random", None, (), "fp32")
    rows = []
    for row in sweep(source, points, config.selection_samples, reference, network, metrics=("fid", "pr")):
        rows.append({key: row[key] for key in (*CHOSEN, "fd", "recognised", "precision", "recall")})
        schedule = schedule_text(row["cfg_schedule"], row["cfg_parameter"])
        print(f"guidance {row['cfg_scale']:<4} {schedule}  FD {row['fd']:.2f}  recognised {row['recognised']:.1%}  "
              f"precision {row['precision']:.3f}  recall {row['recall']:.3f}  ({row['seconds']:.0f} s)", flush=True)
    return rows


def open_images(config: StudyConfig) -> Reference:
    """Return the training images as the reference of every score."""
    return as_reference(FolderImages(f"{config.images}/train"))
