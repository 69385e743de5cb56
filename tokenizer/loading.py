"""Tokenizers from files: our checkpoints, and LlamaGen's released weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mutor_img.checkpoints.folder import check_shapes, find_checkpoint, load_strict, open_group, read_meta
from mutor_img.checkpoints.llamagen import read_pt
from mutor_img.checkpoints.tensor_files import group_hash, has_group
from mutor_img.common.errors import UserError, check_range
from mutor_img.common.files import file_hash
from tokenizer.network.vq import VQModel, preset

RELEASED = ("vq16", "vq8")  # presets that released files are tried against
RELEASED_IMAGE_SIZE = 256  # pixels both were trained at


def load_tokenizer(path: str | Path, device: torch.device | str = "cpu") -> VQModel:
    """Return a tokenizer ready for use: eval mode, fp32, without gradients.

    Args:
        path: a run folder or checkpoint folder of this project (EMA weights where there are any), or a released
            LlamaGen ``.pt`` file (VQ-16 or VQ-8, recognised by its weights).
        device: where its weights go.

    The attribute ``path`` is the given path and ``hash`` the sha256 of the weights file itself.

    Raises:
        UserError: nothing is there, the file is damaged, or it holds another kind of model.
    """
    path = Path(path)
    vq = _load_file(path) if path.is_file() and path.name != "checkpoint.json" else _load_folder(path)
    vq.path = str(path)
    return vq.to(device).eval().requires_grad_(False)


def _load_folder(path: Path) -> VQModel:
    folder = find_checkpoint(path)
    meta = read_meta(folder)
    if meta.get("kind") != "tokenizer":
        raise UserError(f"{folder}: a checkpoint of a {meta.get('kind', 'model of unknown kind')}, not of a tokenizer; "
                        "give the tokenizer's run folder")
    group = "ema" if has_group(meta["files"], "ema") else "model"
    origin, weights = folder / "checkpoint.json", open_group(folder, group)
    try:
        options, image_size = meta["model"], meta["image_size"]
        check_range("the number of blocks", options["blocks"] * len(options["multipliers"]), 1,
                    len(weights.shapes))
        with torch.device("meta"):
            vq = VQModel(**options)
    except (ArithmeticError, KeyError, TypeError, RuntimeError, UserError) as error:
        raise UserError(f"{origin}: does not describe a tokenizer ({error})") from None
    check_shapes(vq, weights.shapes, weights.origin)
    vq = vq.to_empty(device="cpu")
    load_strict(vq, weights.read_all(), weights.origin)
    vq.image_size = image_size
    vq.hash = group_hash(meta["files"], group)
    return vq


def _load_file(path: Path) -> VQModel:
    weights = read_pt(path)
    if "tok_embeddings.weight" in weights:
        raise UserError(f"{path}: weights of a generator, not of a tokenizer; give the tokenizer's file")
    name = next((name for name in RELEASED if _fits(name, weights)), None)
    if name is None:
        raise UserError(f"{path}: weights of no known tokenizer (tried {', '.join(RELEASED)})")
    vq = _empty(preset(name))
    load_strict(vq, weights, path)
    vq.image_size = RELEASED_IMAGE_SIZE
    vq.hash = file_hash(path)
    return vq


def _fits(name: str, weights: dict[str, Tensor]) -> bool:
    with torch.device("meta"):
        own = VQModel(**preset(name)).state_dict()
    return {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in weights.items()}


def _empty(options: dict) -> VQModel:
    """Build a model whose every weight is yet to be loaded, without a draw from the global random generator."""
    with torch.device("meta"):
        vq = VQModel(**options)
    return vq.to_empty(device="cpu")
