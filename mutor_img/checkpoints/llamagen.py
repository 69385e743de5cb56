"""Released LlamaGen files: the only place that knows their layouts.

Weights stand flat, or under ``model``, ``module`` or ``state_dict``; files of LlamaGen's trainer also hold ``ema``
and pickle an ``argparse.Namespace``. They are read with ``weights_only`` and an allow-list of that one class, so
that no file can run code. Facts: arXiv 2406.06525 and the files themselves.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from mutor_img.common.errors import UserError

_WRAPPERS = ("model", "module", "state_dict")
_IGNORED = ("freqs_cis",)  # a rotary table that old files hold as if it were a weight


def read_pt(path: str | Path, ema: bool = False) -> dict[str, Tensor]:
    """Return the weights of a ``.pt`` / ``.pth`` file in LlamaGen's layout, by their names there.

    Args:
        path: the file.
        ema: take the averaged weights under ``ema`` instead of the raw ones.

    Raises:
        UserError: the file is missing, damaged, wants to run code, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file can fail anywhere in torch's reader: IndexError, AssertionError, ..
        # Torch's own words on an unpickling error are a recipe for reading such a file unsafely: not passed on.
        what = ["it is damaged, or holds objects that could run code"] if isinstance(error, UnpicklingError) else \
            str(error).strip().splitlines()
        raise UserError(f"{path}: not a PyTorch weights file that can be read safely "
                        f"({what[0] if what else type(error).__name__})") from None
    if ema:
        if not isinstance(content, dict) or "ema" not in content:
            raise UserError(f"{path}: holds no EMA weights; leave ema off")
        content = content["ema"]
    elif isinstance(content, dict):
        content = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not named weights")
    weights = {k: v for k, v in content.items() if k not in _IGNORED}
    if not weights or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        raise UserError(f"{path}: holds no named weights at the top or under {', '.join(_WRAPPERS)}")
    return weights
