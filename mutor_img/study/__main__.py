"""``python -m mutor_img.study``: the whole way from images to scores, or a table of many runs, by the YAML."""

from __future__ import annotations

if __name__ == "__main__":
    from mutor_img.common.threads import set_spinning

    set_spinning()  # before torch is loaded

import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mutor_img.common.cli import run
from mutor_img.common.config import load_config
from mutor_img.common.files import read_record, write_sealed
from mutor_img.common.locks import claim, folder_lock
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.plan import run_summary
from mutor_img.study.comparison.command import FLAGS, add_flags, compare, is_comparison, spelt_out
from mutor_img.study.config import StudyConfig
from mutor_img.study.pipeline import (
    check_folders,
    classifier_dir,
    equal_seconds,
    generators,
    open_images,
    prepare,
    reconstruction_picture,
    reconstruction_scores,
    score_generator,
    tokenizer_dir,
    train_generator,
)
from mutor_img.study.report import picture_list, score_table, tokenizer_line
from mutor_img.training.command import read_training, training_parser


def plan(config: StudyConfig) -> dict[str, Any]:
    """Return what ``--dry-run`` prints: the runs, in order, and what those of generators cost."""
    check_folders(config)
    runs = {" ".join(["generator", g.config, *g.overrides]):
            run_summary(load_config(GeneratorConfig, g.config, g.overrides)) for g in generators(config)}
    choices = len(config.cfg_scales) * len(config.cfg_schedules)
    judged = {"samples per choice of guidance": config.selection_samples} if choices > 1 else {}
    return {"tokenizer": config.tokenizer, **judged, "samples scored": config.samples, **runs}


def main(argv: Sequence[str]) -> None:
    """Run a study from its config; what is done already is reused."""
    parser = training_parser(
        override="run_dir=runs/again",
        description="Train a tokenizer, encode images, train generators, sample, and score the samples. Prints one "
                    "table at the end. A config with rows and seeds is a comparison: each row is trained and scored "
                    "with every seed (docs/study.md).",
        example="python -m mutor_img.study --config configs/mnist/study.yaml compare=true\n"
                "python -m mutor_img.study --config configs/imagenet256/study.yaml --print-commands sbatch",
    )
    add_flags(parser)
    arguments = parser.parse_intermixed_args(spelt_out(argv))
    if is_comparison(arguments.config):
        compare(arguments)
        return
    parser.refuse(arguments, FLAGS, f"is for a study with rows, which {arguments.config} is not; leave it out")
    config = read_training(arguments, StudyConfig, plan)
    if config is not None:
        check_folders(config)
        with claim(folder_lock(config.run_dir)):
            _study(config)


def _study(config: StudyConfig) -> None:
    """Do what is missing, and print what came out."""
    begun = time.perf_counter()
    prepare(config)
    reference = open_images(config)
    scores = {}
    chosen = generators(config)
    for generator in chosen:
        train_generator(generator)
    if config.compare:
        chosen.append(equal_seconds(chosen[1], chosen[0]))
        train_generator(chosen[-1])
    for generator in chosen:
        scores[generator.name] = score_generator(config, generator, reference)
    tokenizer = read_record(reconstruction_scores(config))
    classifier = read_record(classifier_dir(config) / "classifier.json")
    minutes = (time.perf_counter() - begun) / 60
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
    write_sealed(Path(config.run_dir) / "scores.json", {
        "tokenizer": tokenizer, "classifier": classifier, "generators": scores, "minutes": minutes,
        "peak_memory_gib": peak})
    print(f"\n{score_table(scores, tokenizer)}\n\n{tokenizer_line(tokenizer, classifier)}")
    print(f"{minutes:.1f} minutes in all (what was done before was reused); peak memory {peak:.1f} GiB")
    pictures = [p for g in chosen for p in (g.run_dir / "samples.png", g.run_dir / "loss.png")]
    print("pictures:\n" + picture_list([*pictures, reconstruction_picture(config), tokenizer_dir(config) / "loss.png"]))
    print(f"scores: {config.run_dir}/scores.json")


if __name__ == "__main__":
    run(main)
