"""A generator from files: run folders and checkpoint folders of this project, and released LlamaGen weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mutor_img.blocks import PRESETS, ModelConfig
from mutor_img.checkpoints.folder import check_shapes, codes_of, find_checkpoint, load_strict, open_group, read_meta
from mutor_img.checkpoints.llamagen import read_released
from mutor_img.checkpoints.tensor_files import group_hash, has_group
from mutor_img.common.errors import UserError, check_range, describing
from mutor_img.common.files import file_hash
from mutor_img.registers import RegisterLaw
from mutor_img.transformer import Transformer, sampled_weights

MOST_CELLS = 1024 * 1024  # of a grid
RELEASED_GRID = (16, 16)  # of a state dict that does not say its grid; this is 256 pixels at stride 16


@dataclass
class Loaded:
    """A generator and where it came from.

    Attributes:
        model: in eval mode.
        path: the checkpoint folder, or the ``.pt`` file.
        which: ``"ema"`` or ``"raw"`` weights.
        meta: the checkpoint's JSON; empty for a ``.pt`` file.
        guessed_grid: the grid of codes is an assumption: neither the file nor the caller says it.
    """

    model: Transformer
    path: Path
    which: str
    meta: dict[str, Any]
    guessed_grid: bool = False

    @property
    def codes(self) -> dict[str, Any]:
        """What the run knows of its codes, as :func:`~mutor_img.checkpoints.folder.codes_of`; {} for a ``.pt``."""
        return codes_of(self.path, self.meta)

    @property
    def trained_offsets(self) -> tuple[int, ...] | None:
        """The offsets of the registers that the run was trained with, ascending; None: nothing says them."""
        config = self.model.config
        if config.register_offsets:
            return config.register_offsets
        with describing("generator", self.path / "checkpoint.json"):
            registers = self.meta.get("config", {}).get("registers", {})
            if registers.get("kind", "none") == "none":
                return None
            chosen = tuple(registers.get("offsets", ()))
            return RegisterLaw(registers["kind"], config.grid, registers["d_max"], chosen=chosen).offsets

    @cached_property
    def weights_hash(self) -> str:
        """The sha256 of the weights file; of a sharded checkpoint's files, that of their hashes."""
        if not self.meta:
            return file_hash(self.path)
        return group_hash(self.meta["files"], _group(self.which))


def load_checkpoint(path: str | Path, *, ema: bool | None = None, device: torch.device | str = "cpu",
                    dtype: torch.dtype | None = None, grid: tuple[int, int] | None = None,
                    heads: int | None = None) -> Transformer:
    """Return a generator in eval mode.

    Args:
        path: a run folder (its newest complete checkpoint), a checkpoint folder, its name on the Hugging Face Hub
            (``hf://org/name``), or a ``.pt`` in LlamaGen's layout. The latter may hold ``register_embedding.weight``:
            one row is the vector shared by all registers; d * d - 1 rows are those of the 2D offsets up to d,
            ascending; any other number K those of the offsets 1 to K.
        ema: True: averaged weights; False: raw ones; None: averaged where a run has them, raw for a ``.pt``.
        device: where the weights go.
        dtype: what they are cast to; None: as stored. The rotary table stays fp32.
        grid: rows and columns of codes. A ``.pt`` says them only where it holds the rotary table ``freqs_cis``; 16 x 16
            unless that or this does.
        heads: attention heads, which a ``.pt`` does not say; those of the preset with its layers and dim, else
            dim // 64.

    Raises:
        UserError: nothing is there, the file is damaged or of another kind of model, there are no EMA weights to
            take, or ``grid`` or ``heads`` do not fit what the file says.
    """
    return load_run(path, ema=ema, device=device, dtype=dtype, grid=grid, heads=heads).model


def load_run(path: str | Path, *, ema: bool | None = None, device: torch.device | str = "cpu",
             dtype: torch.dtype | None = None, grid: tuple[int, int] | None = None,
             heads: int | None = None) -> Loaded:
    """Return a generator with what its checkpoint says; arguments and errors as :func:`load_checkpoint`."""
    path, grid = Path(path), grid if grid is None else tuple(grid)
    if path.is_file() and path.name != "checkpoint.json":
        loaded = _load_file(path, bool(ema), grid, heads)
    else:
        loaded = _load_folder(path if path.is_dir() else path.parent if path.is_file() else path, ema, grid, heads)
    loaded.model.to(device=device, dtype=dtype).eval()
    return loaded


def _load_folder(path: Path, ema: bool | None, grid: tuple[int, int] | None, heads: int | None) -> Loaded:
    folder = find_checkpoint(path)
    meta, origin = read_meta(folder), folder / "checkpoint.json"
    if meta.get("kind") != "generator":
        raise UserError(f"{folder}: a checkpoint of a {meta.get('kind', 'model of unknown kind')}, not of a generator; "
                        "give the run folder of a generator")
    averaged = has_group(meta["files"], "ema")
    if ema and not averaged:
        raise UserError(f"{folder}: holds no EMA weights; give --weights raw (in Python ema=False)")
    which = "ema" if averaged and ema is not False else "raw"
    with describing("generator", origin):
        config = ModelConfig.from_json(meta["model"])
    for name, flag, given, own in (("grid", "--grid-size", grid, config.grid),
                                   ("heads", "heads=", heads, config.heads)):
        if given is not None and given != own:
            raise UserError(f"{folder}: {name} {given} was asked for, but the run has {own}; leave {flag} out")
    weights = open_group(folder, _group(which))
    shapes = sampled_weights(weights.shapes)
    with describing("generator", origin):  # without memory, until it is known to have the weights that are there
        check_range("layers", config.layers, 1, len(shapes))
        check_range("codes of the grid", config.length, 1, MOST_CELLS)
        model = _blank(config)
    check_shapes(model, shapes, weights.origin)
    if wrong := _damaged_about_codes(meta.get("codes", {}), config.classes):
        raise UserError(f"{origin}: what it says of its codes is damaged ({wrong}); use another checkpoint")
    load_strict(model.to_empty(device="cpu"), sampled_weights(weights.read_all()), weights.origin)
    model.origin = folder
    return Loaded(model, folder, which, meta)


def _damaged_about_codes(codes: Any, classes: int) -> str | None:
    """Return what sampling could not use of what a checkpoint says of its codes, or None."""
    if not isinstance(codes, dict):
        return "all of it"
    for name, kind in (("tokenizer", str), ("tokenizer_hash", str), ("class_names", list), ("image_size", int)):
        if type(codes.get(name)) not in (kind, type(None)):
            return name
    names = codes.get("class_names")
    if names is not None and (len(names) != classes or not all(isinstance(name, str) for name in names)):
        return "class_names"
    return None


def _group(which: str) -> str:
    return "ema" if which == "ema" else "model"


def _load_file(path: Path, ema: bool, grid: tuple[int, int] | None, heads: int | None) -> Loaded:
    if (path.parent / "checkpoint.json").is_file():  # alone it would not say its grid, and a guess might be wrong
        raise UserError(f"{path}: is part of a checkpoint; give its folder, {path.parent}")
    weights, own = read_released(path, ema)
    if "quantize.embedding.weight" in weights:
        raise UserError(f"{path}: weights of a tokenizer, not of a generator; give the generator's file")
    if grid is not None and own is not None and tuple(grid) != own:
        raise UserError(f"{path}: its rotary table (freqs_cis) is for {own[0]} x {own[1]} codes, but a grid of "
                        f"{grid[0]} x {grid[1]} was asked for; leave the grid out, or give a file for that grid")
    chosen = own or (RELEASED_GRID if grid is None else tuple(grid))
    config = config_from_weights(weights, path, chosen, heads)
    model = _blank(config).to_empty(device="cpu").to(weights["output.weight"].dtype)
    load_strict(model, sampled_weights(weights), path)
    return Loaded(model, path, "ema" if ema else "raw", {}, guessed_grid=own is None and grid is None)


def config_from_weights(weights: dict[str, Tensor], origin: str | Path, grid: tuple[int, int],
                        heads: int | None = None) -> ModelConfig:
    """Read a model's size off its weights in LlamaGen's layout.

    Args:
        weights: named tensors.
        origin: what an error names.
        grid, heads: as in :func:`load_checkpoint`.

    Raises:
        UserError: weights of something else, or heads that do not divide dim.
    """
    for name in ("tok_embeddings.weight", "cls_embedding.embedding_table.weight", "output.weight"):
        if name not in weights or weights[name].dim() != 2:
            raise UserError(f"{origin}: weight {name!r} is missing or no matrix; not a generator in LlamaGen's layout")
    vocabulary, dim = weights["tok_embeddings.weight"].shape
    layers = 1 + max((int(m[1]) for m in map(re.compile(r"layers\.(\d+)\.").match, weights) if m), default=-1)
    if layers < 1 or layers > len(weights):
        raise UserError(f"{origin}: {layers} layers in {len(weights)} weights; not a generator in LlamaGen's layout")
    if heads is None:
        heads = next((h for n, h, d in PRESETS.values() if (n, d) == (layers, dim)), max(1, dim // 64))
    if heads < 1 or dim % heads:
        raise UserError(f"{origin}: dim {dim} does not divide into {heads} heads; give heads=")
    embedding = weights.get("register_embedding.weight")
    offsets = None if embedding is None else _offsets_of(len(embedding), grid, origin)
    return ModelConfig(layers, heads, dim, grid, vocabulary,
                       classes=len(weights["cls_embedding.embedding_table.weight"]) - 1, register_offsets=offsets)


def _offsets_of(rows: int, grid: tuple[int, int], origin: str | Path) -> Sequence[int]:
    """Return the offsets that the rows of a register embedding stand for; a bare state dict does not say them."""
    if rows < 1:
        raise UserError(f"{origin}: 'register_embedding.weight' has no rows")
    if rows == 1:
        return ()
    d_max = isqrt(rows + 1)
    if d_max * d_max == rows + 1 and d_max <= min(grid):
        return RegisterLaw("2d", grid, d_max).offsets
    return tuple(range(1, rows + 1))


def _blank(config: ModelConfig) -> Transformer:
    """Build a model without memory for its weights, and without a draw from the global random generator."""
    with torch.device("meta"):
        return Transformer(config)
