"""The three commands that have a script at the top level, and under another name when the project is installed.

A command's module is imported late, by its name: torch must not be loaded before the environment is set.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from mutor_img.common.cli import run
from mutor_img.common.errors import UserError
from mutor_img.common.threads import set_spinning


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
    set_spinning()
    run(lambda argv: _import(module).main(argv))


def _import(module: str) -> ModuleType:
    """Import a command's module.

    Raises:
        UserError: another package named tokenizer stands before the project's own.
    """
    try:
        return import_module(module)
    except ImportError as error:
        if error.name != "tokenizer":
            raise
        raise UserError(str(error)) from None
