"""Weights & Biases, through Accelerate's interface: a run's numbers, pictures and config, beside its own files."""

from __future__ import annotations

import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutor_img.common.errors import UserError
from mutor_img.common.files import read_record, write_sealed

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "mutor_img"  # unless WANDB_PROJECT names another
RECORD = "trackers.json"  # in the run folder: the run's id, so that a later sitting goes on in the same run


def open_wandb(config: Any) -> GeneralTracker:
    """Begin a run of Weights & Biases, or go on with the one that an earlier sitting began.

    Its own settings hold, such as ``WANDB_MODE=offline``, ``WANDB_PROJECT`` and ``WANDB_ENTITY``. Its files lie in the
    run folder.

    Args:
        config: of the run; ``run_dir`` is the run's name.

    Raises:
        UserError: the package is missing, the record of the run's id is damaged, or it cannot begin: nobody is logged
            in, its server cannot be reached, or its settings cannot be.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"train.trackers names wandb, whose package is missing ({error}); pip install "
                        "'mutor_img[wandb]', or leave it out") from None
    from accelerate.tracking import WandBTracker  # a second to import

    tracker = WandBTracker(os.environ.get("WANDB_PROJECT", PROJECT), name=str(config.run_dir), dir=str(config.run_dir),
                           id=_run_id(Path(config.run_dir) / RECORD), resume="allow")
    try:
        tracker.start()
        tracker.store_init_configuration(asdict(config))
    except (wandb.errors.Error, ValueError) as error:  # the latter: settings of the environment, as pydantic sees them
        lines = [line.strip() for line in str(error).strip().splitlines()]
        why = lines[0] if isinstance(error, wandb.errors.Error) else " ".join(lines[:3])
        raise UserError(f"train.trackers: wandb cannot start ({why}); run wandb login, or set WANDB_MODE=offline and "
                        "wandb sync later") from None
    return tracker


def show_picture(tracker: GeneralTracker, name: str, path: Path, step: int) -> None:
    """Log a picture from its file."""
    from PIL import Image

    with Image.open(path) as picture:
        tracker.log_images({name: [picture]}, step=step)


def _run_id(record: Path) -> str:
    """Return the run's id, which is drawn and noted before the first sitting.

    Raises:
        UserError: something else is noted there.
    """
    if not record.is_file():
        write_sealed(record, {"wandb": secrets.token_hex(4)})
    known = read_record(record, "wandb")["wandb"]
    if not isinstance(known, str):
        raise UserError(f"{record}: has no id of wandb's run, as in {{'wandb': '1a2b3c4d'}}; remove it to start "
                        "another run there")
    return known
