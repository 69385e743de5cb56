"""Released LlamaGen files: the only place that knows their layouts.

Weights stand flat, or under ``model``, ``module`` or ``state_dict``; files of LlamaGen's trainer also hold ``ema``
and pickle an ``argparse.Namespace``, those of taming-transformers name a class of Lightning. They are read with
``weights_only`` and an allow-list of these two, the second replaced by an empty class, so that no file can run
code. Facts: arXiv 2406.06525 and the files themselves.
"""

from __future__ import annotations

import argparse
import zipfile
from math import isqrt
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from mutor_img.common.errors import UserError
from mutor_img.common.file_kinds import PICKLE, kind_of

_WRAPPERS = ("model", "module", "state_dict")
_LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
_TABLE = "freqs_cis"  # a rotary table that old files hold as if it were a weight: a row for the class and each code
_TEXT = ("cls_embedding.cap_proj.", "cls_embedding.uncond_embedding")  # a caption's embedding in a class's place
_PACKAGING = {  # what a wrapper's name inside the names of weights tells
    "module": "DistributedDataParallel's or DeepSpeed's", "_orig_mod": "torch.compile's",
    "_fsdp_wrapped_module": "FSDP's", "_checkpoint_wrapped_module": "activation checkpointing's",
    "_forward_module": "Lightning's",
}


class _Callback:
    """Stands for the class of Lightning under whose name a training file keeps what nobody reads here."""


def read_pt(path: str | Path) -> dict[str, Tensor]:
    """Return the raw weights of a ``.pt`` / ``.pth`` file in LlamaGen's layout, by their names there.

    Raises:
        UserError: the file is missing, damaged, wants to run code, holds no tensors, or holds those of a wrapped or of
            a text-to-image model.
    """
    return read_released(path)[0]


def read_released(path: str | Path, ema: bool = False) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """Return what :func:`read_pt` does, and the grid of codes that the file's rotary table is for, if it holds one.

    Args:
        path: the file.
        ema: take the averaged weights under ``ema`` instead of the raw ones.
    """
    content = _load(path)
    chosen = _choose(content, path, ema)
    weights = {k: v for k, v in chosen.items() if k != _TABLE}
    if not weights or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        raise UserError(f"{path}: holds no named weights at the top or under {', '.join(_WRAPPERS)}")
    _refuse_foreign(weights, path)
    _refuse_stretched(weights, path)
    places = [chosen, content, *(content[name] for name in _WRAPPERS if isinstance(content.get(name), dict))]
    grids = [_grid_of(place[_TABLE]) for place in places if _TABLE in place]
    return weights, next(filter(None, grids), None)


def _load(path: str | Path) -> object:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        _check_zip(path)
        with torch.serialization.safe_globals([argparse.Namespace, (_Callback, _LIGHTNING)]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file can fail anywhere in torch's reader: IndexError, AssertionError, ..
        # Torch's own words on an unpickling error are a recipe for reading such a file unsafely: not passed on.
        what = ["it is damaged, or holds objects that could run code"] if isinstance(error, UnpicklingError) else \
            str(error).strip().splitlines()
        kind = kind_of(path)
        what = what if kind in (None, PICKLE) else [kind]
        raise UserError(f"{path}: not a PyTorch weights file that can be read safely "
                        f"({what[0] if what else type(error).__name__})") from None
    return content


def _check_zip(path: Path) -> None:
    """Raise for a zip with compressed entries, or with one that does not fit its checksum.

    Torch compresses none, and kilobytes could stand for gigabytes. It compares no checksums: weights that are damaged
    would load as others. Where it was told to compute none, they are 0.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its entries are compressed, as torch.save never writes them")
            for entry in filter(lambda entry: entry.CRC, archive.infolist()):
                with archive.open(entry) as file:
                    while file.read(2**20):
                        pass


def _choose(content: object, path: str | Path, ema: bool) -> dict:
    if ema:
        if not isinstance(content, dict) or "ema" not in content:
            raise UserError(f"{path}: holds no EMA weights; give --weights raw (in Python ema=False)")
        content = content["ema"]
    elif isinstance(content, dict):
        content = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not named weights")
    return content


def _grid_of(table: object) -> tuple[int, int] | None:
    """Return the grid whose rotary table has these rows: one for the class, one for each code of a square."""
    rows = len(table) if isinstance(table, Tensor) and table.dim() else 0
    side = isqrt(max(0, rows - 1))
    return (side, side) if side and side * side == rows - 1 else None


def _refuse_stretched(weights: dict[str, Tensor], path: str | Path) -> None:
    """Raise :class:`UserError` for weights of far more numbers than the file holds: a model would take them all.

    A few may share what they hold, as tied weights do.
    """
    named, held = sum(w.numel() * w.element_size() for w in weights.values()), Path(path).stat().st_size
    if named > 4 * held:
        raise UserError(f"{path}: its weights would take {named} bytes, but the file has {held}: they are views of "
                        "each other; save them with .clone()")


def _refuse_foreign(weights: dict[str, Tensor], path: str | Path) -> None:
    """Raise :class:`UserError` for weights that a reader would only call unknown, saying what they are."""
    if any(name.startswith(_TEXT) for name in weights):
        raise UserError(f"{path}: a text-to-image generator (its {_TEXT[0]}* takes captions); this project makes "
                        "images of classes; give a class-conditional file, such as LlamaGen's c2i_*.pt")
    parts = {part for name in weights for part in name.split(".")}
    found = [part for part in _PACKAGING if part in parts]
    if found:
        words = " and ".join(f"{part!r}, {_PACKAGING[part]}" for part in found)
        raise UserError(f"{path}: weights of a wrapped model: their names contain {words}; save the state dict of "
                        f"the model inside the wrapper, or remove {found[0] + '.'!r} from the names and save again")
