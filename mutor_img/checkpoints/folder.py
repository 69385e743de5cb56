"""Checkpoints: safetensors and a JSON that a person can read, complete or absent, never pickle.

A run folder holds ``checkpoints/step_00001000/`` with ``model.safetensors``, where there are any
``ema.safetensors`` and ``optimizer.safetensors``, and ``checkpoint.json``: the step, what is needed to build the model
again, and size and sha256 of every tensor file. A folder is written aside, flushed, renamed, and only then
named in ``checkpoints/latest``; older ones are pruned last. So a kill at any moment leaves the newest complete
checkpoint in place.

A run of several processes writes ``model.00000-of-00008.safetensors`` and so on, one file for each of them (see
``tensor_files.py``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mutor_img.checkpoints.tensor_files import Files, Slice, TensorGroup, differs, write_groups
from mutor_img.common.errors import UserError
from mutor_img.common.files import (
    check_format,
    clear,
    discard,
    flush,
    from_above,
    read_json,
    remove,
    wait_until_seen,
    write_atomic,
    write_json,
    write_sealed,
)
from mutor_img.common.hub import PACKED, hub_folder, is_hub_name, pinned

FORMAT = "mutor_img checkpoint 1"


class Processes(Protocol):
    """Who writes a checkpoint together."""

    rank: int
    world: int

    def barrier(self) -> None:
        """Wait for all."""


def write_checkpoint(run_dir: str | Path, step: int, tensors: dict[str, dict[str, Tensor | Slice]],
                     meta: dict[str, Any], keep: int, processes: Processes | None = None,
                     milestones: Collection[int] = ()) -> Path:
    """Write one complete checkpoint, mark it as the latest, and prune all but the ``keep`` newest and the milestones.

    Args:
        run_dir: the run folder; with ``processes`` one that all of them see.
        step: updates done.
        tensors: groups of named tensors, e.g. ``{"model": {...}, "ema": {...}}``; each becomes a file, or one per
            process where some are slices.
        meta: what else the JSON holds; plain JSON values only.
        processes: None: this process has everything. Else all of them call this, each with its slices; tensors that
            are whole are taken from rank 0.
        milestones: steps whose checkpoints are never pruned.

    Raises:
        UserError: the files of another process cannot be seen from here.
        OSError: the disk is full.
    """
    rank = processes.rank if processes else 0
    barrier = processes.barrier if processes else (lambda: None)
    root = Path(run_dir) / "checkpoints"
    final = root / _name(step)
    aside = root / f".{_name(step)}.part"
    if rank == 0:
        _remove_parts(root)
        clear(aside)
        aside.mkdir(parents=True)
    barrier()
    wait_until_seen(lambda: None if aside.is_dir() else aside, "run_dir", patience=0)  # asked for by nobody before
    try:
        files = write_groups(aside, tensors, rank, processes.world if processes else 1)
        if rank > 0:
            write_json(aside / f"rank_{rank:05d}.json", files)
        barrier()
        if rank == 0:
            for other in range(1, processes.world if processes else 1):
                files.update(_files_of(aside / f"rank_{other:05d}.json"))
            write_sealed(aside / "checkpoint.json", {"format": FORMAT, "step": step, **meta, "files": files})
            clear(final)  # only ever an earlier, incomplete attempt at this step
            os.rename(aside, final)
    finally:
        if rank == 0:
            remove(aside)
    if rank == 0:
        flush(root)
        _mark_latest(final)
        stay = {_name(milestone) for milestone in milestones}
        for old in [path for path in sorted(_complete(root))[:-keep] if path.name not in stay]:
            discard(old)  # what a kill leaves of it is no checkpoint, and removed next time
    barrier()
    return final


def _remove_parts(root: Path) -> None:
    for old in root.glob(".step_*.part"):  # of a killed attempt, or could not be removed before
        remove(old)


def tidy(run_dir: str | Path) -> Path | None:
    """Do what a kill left undone once the newest checkpoint had appeared; returns that checkpoint, None: there is none.

    Older ones that were to be pruned stay until the next save.
    """
    newest = newest_checkpoint(run_dir)
    if newest is not None:
        _remove_parts(newest.parent)
        latest = newest.with_name("latest")
        if not latest.is_file() or latest.read_text() != newest.name + "\n":
            _mark_latest(newest)
    return newest


def _mark_latest(folder: Path) -> None:
    write_atomic(folder.parent / "latest", lambda path: path.write_text(folder.name + "\n"))


def checkpoint_at(run_dir: str | Path, step: int) -> Path:
    """Return where a run's checkpoint after ``step`` updates is, or would be."""
    return Path(run_dir) / "checkpoints" / _name(step)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _files_of(path: Path) -> Files:
    """Return and remove what another process wrote of its files.

    Raises:
        UserError: it is not there.
    """
    wait_until_seen(lambda: None if path.is_file() else path, "run_dir", patience=0)  # asked for by nobody before
    files = read_json(path)
    remove(path)
    return files


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint folder that ``path`` means: itself, or the newest one of a run folder.

    Args:
        path: a folder, or a name on the Hugging Face Hub, whose files are fetched where they are not in its cache.

    Raises:
        UserError: nothing of ours is there.
    """
    path = hub_folder(path) if is_hub_name(path) else Path(path)
    if (path / "checkpoint.json").is_file():
        return path
    found = newest_checkpoint(path)
    if found is None:
        reason = "no such file or folder" if not path.exists() else "no complete checkpoint in it"
        raise UserError(f"{path}: {reason}; give a run folder, or a checkpoint folder that holds checkpoint.json")
    return found


def newest_of(path: str | Path, fallback: bool = False) -> str:
    """Return the newest checkpoint of a run folder, the commit that a Hub name means, any other path as it is.

    What it returns goes on to mean the same weights while a run trains, or a branch on the Hub moves.

    Args:
        path: what a user names.
        fallback: of a run folder the newest intact checkpoint, which takes reading them.
    """
    if is_hub_name(path):
        return pinned(path)
    return str((newest_intact(path) if fallback else newest_checkpoint(path)) or path)


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """Return the newest checkpoint folder of a run, or None. What is damaged in it shows when it is read."""
    return max(_complete(Path(run_dir) / "checkpoints"), default=None)


def newest_intact(run_dir: str | Path) -> Path | None:
    """Return the newest checkpoint folder of a run all of whose files are as they were written, or None. Reads them."""
    return next((f for f in sorted(_complete(Path(run_dir) / "checkpoints"), reverse=True) if _is_intact(f)), None)


def _is_intact(folder: Path) -> bool:
    try:
        files = peek_meta(folder)["files"]
        return not any(differs(folder / name, file) for name, file in files.items())
    except (UserError, OSError):
        return False


def leave_damaged(run_dir: str | Path) -> Path | None:
    """Rename the damaged checkpoints newer than a run's newest intact one, which is returned; None: there is none.

    They stay beside it as ``damaged_step_00005000`` and are checkpoints no more.

    Raises:
        UserError: there are checkpoints, and none is intact.
    """
    root, intact = Path(run_dir) / "checkpoints", newest_intact(run_dir)
    for folder in _complete(root):
        if intact is None:
            raise UserError(f"{run_dir}: none of its checkpoints is intact; give another run_dir, or fetch a copy")
        if folder > intact:
            clear(aside := root / f"damaged_{folder.name}")
            os.rename(folder, aside)
            print(f"{folder}: damaged, now called {aside.name}; going on from {intact}")
    if intact is not None:
        _mark_latest(intact)
    return intact


@contextmanager
def _naming_intact(folder: Path) -> Iterator[None]:
    """Add to an error about a damaged checkpoint which one of the same run to take in its place."""
    try:
        yield
    except UserError as error:
        intact = newest_intact(folder.parent.parent) if folder.parent.name == "checkpoints" else None
        if intact in (None, folder):
            raise
        raise UserError(f"{error}; the newest intact one is {intact}: give its path, or --fallback") from None


def read_meta(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's JSON.

    Raises:
        UserError: it is of another format or version, or damaged; then it names an intact one, for which the weights
            of the run's other checkpoints are read.
    """
    with _naming_intact(folder):
        return peek_meta(folder)


def codes_of(folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """Return what a run knows of its codes: tokenizer, tokenizer_hash, class_names, image_size; {} where it says none.

    A tokenizer that lies in the checkpoint's folder, as in a repository on the Hub, is the one that it names.
    """
    codes, packed = meta.get("codes", {}), folder / PACKED
    if (packed / "checkpoint.json").is_file():
        return {**codes, "tokenizer": str(packed)}
    return {**codes, "tokenizer": from_above(codes["tokenizer"], folder)} if codes.get("tokenizer") else codes


def peek_meta(folder: Path) -> dict[str, Any]:
    """Return what :func:`read_meta` does, for a glance: an error names no other checkpoint, and reads none."""
    path = folder / "checkpoint.json"
    meta = read_json(path)
    check_format(meta.get("format") if isinstance(meta, dict) else None, FORMAT, path)
    if type(meta.get("step")) is not int or not _are_files(meta.get("files")):
        raise UserError(f"{path}: damaged (it lacks the step, or sizes and hashes of files); use another checkpoint")
    return meta


def _are_files(files: Any) -> bool:
    return isinstance(files, dict) and all(
        Path(name).name == name and isinstance(file, dict) and type(file.get("bytes")) is int
        and isinstance(file.get("sha256"), str) for name, file in files.items())


def open_group(folder: Path, group: str, rank: int = 0, world: int = 1) -> TensorGroup:
    """Open one group (``"model"``, ``"ema"``, ``"optimizer"``) of a checkpoint; ``world`` processes share the checking.

    Raises:
        UserError: a file is missing, shorter than written, or its hash differs.
    """
    with _naming_intact(folder):
        return TensorGroup(folder, peek_meta(folder)["files"], group, rank, world)


def read_tensors(folder: Path, group: str) -> dict[str, Tensor]:
    """Return the named tensors of one group (``"model"``, ``"ema"``, ``"optimizer"``), whole, on the CPU.

    Raises:
        UserError: a file is missing, shorter than written, or its hash differs.
    """
    return open_group(folder, group).read_all()


def load_strict(model: torch.nn.Module, tensors: dict[str, Tensor], origin: str | Path) -> None:
    """Load a state dict into ``model``: every key present, none left over, every shape equal.

    Raises:
        UserError: naming the first key that is missing, unknown or of another shape.
    """
    check_shapes(model, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, origin)
    model.load_state_dict(tensors)


def fill_blank(model: torch.nn.Module, tensors: dict[str, Tensor], device: torch.device | str) -> torch.nn.Module:
    """Give a model without memory behind its tensors these ones: themselves, not copies. Returns it.

    Args:
        model: on the device ``meta``. What it holds beside weights it makes anew itself.
        tensors: its whole state dict, of any dtype, on ``device``.
        device: where the model is to be.
    """
    model.load_state_dict(tensors, assign=True)
    for module in model.modules():
        module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor,
                      recurse=False)
    return model


def check_shapes(model: torch.nn.Module, shapes: dict[str, tuple[int, ...]], origin: str | Path) -> None:
    """Check that weights of these names and shapes are all that ``model`` has, and nothing else.

    Raises:
        UserError: naming the first key that is missing, unknown or of another shape.
    """
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for key in own.keys() - shapes.keys():
        raise UserError(f"{origin}: weight {key!r} is missing; the file is of another model")
    for key in shapes.keys() - own.keys():
        raise UserError(f"{origin}: unknown weight {key!r}; the file is of another model")
    for key, shape in shapes.items():
        if shape != own[key]:
            raise UserError(f"{origin}: weight {key!r} has shape {shape}; the model has {own[key]}")


def _complete(root: Path) -> list[Path]:
    """Return the checkpoint folders, which appeared whole: what is missing in one of them was lost since."""
    return [folder for folder in (root.glob("step_*") if root.is_dir() else ())
            if re.fullmatch(r"step_\d{8}", folder.name) and (folder / "checkpoint.json").is_file()]
