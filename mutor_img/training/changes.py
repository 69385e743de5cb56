"""What may differ between the sittings of one run, and what makes it another run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mutor_img.checkpoints.tensor_files import has_group
from mutor_img.common.errors import UserError
from mutor_img.common.processes import leaves

# Other ones make another run.
IDENTITY = ("seed", "model.", "objective.", "registers.", "train.global_batch", "data.image_size")
# What a checkpoint did that is older than the key.
EARLIER = {"objective.kind": "mutor", "model.qk_norm": False, "freeze": []}
SILENT = (  # change where, how fast or how long a run trains and what it shows, not what an update computes
    "run_dir", "init_from", "data.codes", "data.val_codes", "model.attention", "model.loss_chunk", "pictures.", "plan.",
    "expected_loss", "eval.", "train.steps", "train.micro_batch", "train.compile", "train.parallel",
    "train.activation_checkpointing", "train.log_every", "train.trackers", "train.checkpoint_every", "train.keep",
    "train.milestones", "train.validate_every", "train.picture_every", "train.timeout_minutes",
    "train.check_ranks_every", "train.skip_bad_updates",
)


def check_changes(recorded: Mapping[str, Any], current: Mapping[str, Any], folder: str | os.PathLike) -> list[str]:
    """Compare a checkpoint's record with how the run is to go on; returns what changed, one phrase each.

    Args:
        recorded: the checkpoint's metadata: ``config``, for a generator ``codes``, for a tokenizer ``images_hash``.
        current: the same of the run as it is to go on.
        folder: the checkpoint, for the error.

    Raises:
        UserError: it would be another run: other codes or images, image size, seed, model, registers or global batch.
    """
    before, now = {**EARLIER, **dict(leaves(recorded["config"]))}, dict(leaves(current["config"]))
    changed = [key for key in now if key in before and before[key] != now[key] and not key.startswith(SILENT)]
    other = [key for key in changed if key.startswith(IDENTITY)]
    if other:
        key = other[0]
        raise UserError(f"{folder} was trained with {key} {before[key]}, now it is {now[key]}, which is another run; "
                        "give another run_dir (with init_from it can start from the weights of this one)")
    if _hashes(recorded) != _hashes(current):
        raise UserError(f"{folder} was trained on other codes than data.codes={now.get('data.codes')}; give the former "
                        "codes, or another run_dir")
    images = current.get("images_hash")
    if images != recorded.get("images_hash", images):  # of a tokenizer; older checkpoints do not say it
        raise UserError(f"{folder} was trained on other images than data.images={now.get('data.images')}; give the "
                        "former images, or another run_dir")
    return [f"{key} {before[key]} -> {now[key]}" for key in changed]


def decisive(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return by dotted name those settings of a generator's run that decide its weights, where they are no defaults.

    Without the defaults, a setting that a later version adds makes no other run of one that is there. The number of
    updates counts where the learning rate depends on it; else a longer run is the same one carried on.

    Args:
        config: the run's, as sections.
        defaults: those of its schema.
    """
    known = dict(leaves(defaults))
    counted = ("init_from", "data.codes", *(() if config["optim"]["schedule"] == "constant" else ("train.steps",)))
    return {key: value for key, value in leaves(config)
            if (key in counted or not key.startswith(SILENT)) and value != known.get(key)}


def require_group(recorded: Mapping[str, Any], group: str, folder: str | os.PathLike, why: str) -> None:
    """Check that a checkpoint holds a group of tensors that the run as it goes on needs.

    Args:
        recorded: the checkpoint's metadata.
        group: e.g. ``"ema"``.
        folder: the checkpoint, for the error.
        why: which setting asks for it now and did not when the checkpoint was written, and the fix.

    Raises:
        UserError: it is not there.
    """
    if not has_group(recorded["files"], group):
        raise UserError(f"{folder}: has no {group}.safetensors: {why}")


def _hashes(metadata: Mapping[str, Any]) -> list[str]:
    return [store["hash"] for store in metadata.get("codes", {}).get("stores", [])]
