"""The three commands that have a script at the top level, and under another name when the project is installed.

A command's module is imported late, by its name: torch must not be loaded before the environment is set.
"""

from __future__ import annotations

from importlib import import_module

from mutor_img.common.cli import run
from mutor_img.common.threads import spin_briefly


def train() -> None:
    """``train.py`` and ``mutor-train``."""
    _open("mutor_img.pretraining.command")


def sample() -> None:
    """``sample.py`` and ``mutor-sample``."""
    _open("mutor_img.sampling.command")


def evaluate_fid() -> None:
    """``evaluate_fid.py`` and ``mutor-evaluate-fid``."""
    _open("mutor_img.evaluation.command")


def _open(module: str) -> None:
    spin_briefly()
    run(import_module(module).main)
