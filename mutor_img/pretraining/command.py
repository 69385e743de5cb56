"""The command ``train.py``."""

from __future__ import annotations

from collections.abc import Sequence

from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.plan import plan_generator
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training.command import train_command


def main(argv: Sequence[str]) -> None:
    """Train a generator."""
    train_command(
        argv, GeneratorTask, GeneratorConfig, plan_generator,
        description="Train a class-conditional transformer on VQ codes, with or without MuToR's registers. "
                    "To resume, run the same command again.",
        example="torchrun --nproc-per-node 8 train.py --config configs/imagenet256/mutor2d_b_80.yaml "
                "data.codes=codes/imagenet256",
    )
