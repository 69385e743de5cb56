"""Checkpoints: safetensors and a JSON that a person can read, complete or absent, never pickle.

A run folder holds ``checkpoints/step_00001000/`` with ``model.safetensors``, where there are any
``ema.safetensors`` and ``optimizer.safetensors``, and ``checkpoint.json``: the step, what is needed to build the model
again, and size and sha256 of every tensor file. A folder is written aside, flushed, renamed, and only then
named in ``checkpoints/latest``; older ones are pruned last. So a kill at any moment leaves the newest complete
checkpoint in place.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mutor_img.errors import UserError
from mutor_img.files import file_hash, read_json, write_atomic, write_json

FORMAT = "mutor_img checkpoint 1"


def write_checkpoint(run_dir: str | Path, step: int, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any],
                     keep: int) -> Path:
    """Write one complete checkpoint, mark it as the latest, and prune all but the ``keep`` newest.

    Args:
        run_dir: the run folder.
        step: updates done.
        tensors: groups of named tensors, e.g. ``{"model": {...}, "ema": {...}}``; each becomes a file.
        meta: what else the JSON holds; plain JSON values only.
    """
    root = Path(run_dir) / "checkpoints"
    final = root / f"step_{step:08d}"
    aside = root / f".step_{step:08d}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        files = {}
        for group, content in tensors.items():
            path = aside / f"{group}.safetensors"
            save_file({k: v.detach().contiguous().cpu() for k, v in content.items()}, path)
            _flush(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        write_json(aside / "checkpoint.json", {"format": FORMAT, "step": step, **meta, "files": files})
        shutil.rmtree(final, ignore_errors=True)  # only ever an earlier, incomplete attempt at this step
        os.rename(aside, final)
    except SafetensorError as error:
        raise OSError(28, f"could not write ({error})", str(aside)) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _flush(root)
    write_atomic(root / "latest", lambda path: path.write_text(final.name + "\n"))
    for old in sorted(_complete(root))[:-keep]:
        shutil.rmtree(old)
    return final


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint folder that ``path`` means: itself, or the newest complete one of a run folder.

    Raises:
        UserError: nothing of ours is there.
    """
    path = Path(path)
    if (path / "checkpoint.json").is_file():
        return path
    found = newest_checkpoint(path)
    if found is None:
        reason = "no such file or folder" if not path.exists() else "no complete checkpoint in it"
        raise UserError(f"{path}: {reason}; give a run folder, or a checkpoint folder that holds checkpoint.json")
    return found


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint folder of a run, or None."""
    return max(_complete(Path(run_dir) / "checkpoints"), default=None)


def read_meta(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's JSON.

    Raises:
        UserError: it is of another format or version.
    """
    meta = read_json(folder / "checkpoint.json")
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{folder / 'checkpoint.json'}: not a checkpoint of this project's format ({FORMAT})")
    return meta


def read_tensors(folder: Path, group: str) -> dict[str, Tensor]:
    """Return the named tensors of one group (``"model"``, ``"ema"``, ``"optimizer"``), on the CPU.

    Raises:
        UserError: the file is missing, shorter than written, or its hash differs.
    """
    path = folder / f"{group}.safetensors"
    expected = read_meta(folder)["files"].get(path.name)
    if expected is None or not path.is_file():
        raise UserError(f"{path}: no such file in this checkpoint")
    if path.stat().st_size != expected["bytes"] or file_hash(path) != expected["sha256"]:
        raise UserError(f"{path}: damaged (its size or sha256 differs from checkpoint.json); use another checkpoint")
    return read_safetensors(path)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Return every tensor of a safetensors file, on the CPU.

    Raises:
        UserError: the file cannot be read as safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def load_strict(model: torch.nn.Module, tensors: dict[str, Tensor], origin: str | Path) -> None:
    """Load a state dict into ``model``: every key present, none left over, every shape equal.

    Raises:
        UserError: naming the first key that is missing, unknown or of another shape.
    """
    own = model.state_dict()
    for key in own.keys() - tensors.keys():
        raise UserError(f"{origin}: weight {key!r} is missing; the file is of another model")
    for key in tensors.keys() - own.keys():
        raise UserError(f"{origin}: unknown weight {key!r}; the file is of another model")
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise UserError(f"{origin}: weight {key!r} has shape {tuple(tensor.shape)}; the model has "
                            f"{tuple(own[key].shape)}")
    model.load_state_dict(tensors)


def _complete(root: Path) -> list[Path]:
    """Return the checkpoint folders whose JSON and tensor files are all there at their full size."""
    folders = []
    for folder in root.glob("step_*") if root.is_dir() else ():
        if not re.fullmatch(r"step_\d{8}", folder.name) or not (folder / "checkpoint.json").is_file():
            continue
        files = read_meta(folder)["files"]
        if all((folder / n).is_file() and (folder / n).stat().st_size == f["bytes"] for n, f in files.items()):
            folders.append(folder)
    return folders


def _flush(path: Path) -> None:
    """Make a file or a folder's entries durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
