"""Tokenizers from files: our checkpoints, and the released weights of LlamaGen, taming-transformers and MaskGIT."""

from __future__ import annotations

from operator import index
from pathlib import Path

import torch
from torch import Tensor

from mutor_img.checkpoints.folder import check_shapes, find_checkpoint, load_strict, open_group, read_meta
from mutor_img.checkpoints.llamagen import read_pt
from mutor_img.checkpoints.tensor_files import group_hash, sampled_group
from mutor_img.common.errors import UserError, check_range, describing
from mutor_img.common.files import file_hash
from mutor_img.common.hub import is_hub_name, pinned
from tokenizer.foreign import load_foreign
from tokenizer.network.interface import ImageTokenizer
from tokenizer.network.maskgit import MaskGITModel
from tokenizer.network.vq import VQModel, preset

NETWORKS = {"vq": VQModel, "maskgit": MaskGITModel}  # by what a checkpoint says of its architecture, if it says it
RELEASED = ("vq16", "vq8")  # presets that released files are tried against
RELEASED_IMAGE_SIZE = 256  # pixels that all released ones were trained at


def load_tokenizer(path: str | Path, device: torch.device | str = "cpu") -> ImageTokenizer:
    """Return a tokenizer ready for use: eval mode, fp32, without gradients.

    Args:
        path: a run folder or checkpoint folder of this project (EMA weights where there are any), its name on the
            Hugging Face Hub (``hf://org/name``), or a released file, recognised by its weights: LlamaGen's VQ-16 or
            VQ-8, a VQGAN of taming-transformers, or MaskGIT's VQ in PyTorch.
        device: where its weights go.

    The attribute ``path`` is the given path, a Hub name with its commit, and ``hash`` the sha256 of the weights file
    itself.

    Raises:
        UserError: nothing is there, the file is damaged, or it holds another kind of model.
    """
    given = pinned(path) if is_hub_name(path) else str(path)
    path = Path(given)
    vq = _load_file(path) if path.is_file() and path.name != "checkpoint.json" else _load_folder(path)
    vq.path = given
    return vq.to(device).eval().requires_grad_(False)


def _load_folder(path: Path) -> ImageTokenizer:
    folder = find_checkpoint(path)
    meta = read_meta(folder)
    if meta.get("kind") != "tokenizer":
        raise UserError(f"{folder}: a checkpoint of a {meta.get('kind', 'model of unknown kind')}, not of a tokenizer; "
                        "give the tokenizer's run folder")
    group = sampled_group(meta["files"])
    origin, weights = folder / "checkpoint.json", open_group(folder, group)
    with describing("tokenizer", origin):
        options, image_size = meta["model"], meta["image_size"]
        if image_size is not None:
            check_range("image_size", index(image_size), 1, 65536)
        check_range("the number of blocks", options.get("blocks", 1) * len(options["multipliers"]), 1,
                    len(weights.shapes))
        vq = _blank(options)
    check_shapes(vq, weights.shapes, weights.origin)
    vq = vq.to_empty(device="cpu")
    load_strict(vq, weights.read_all(), weights.origin)
    vq.image_size = image_size
    vq.hash, vq.origin = group_hash(meta["files"], group), folder
    return vq


def _load_file(path: Path) -> ImageTokenizer:
    weights = read_pt(path)
    if "tok_embeddings.weight" in weights:
        raise UserError(f"{path}: weights of a generator, not of a tokenizer; give the tokenizer's file")
    name = next((name for name in RELEASED if _fits(name, weights)), None)
    vq = load_foreign(weights, path) if name is None else _blank(preset(name)).to_empty(device="cpu")
    if vq is None:
        raise UserError(f"{path}: weights of no known tokenizer (tried {', '.join(RELEASED)}, taming-transformers, "
                        "MaskGIT)")
    if name is not None:
        load_strict(vq, weights, path)
    vq.image_size = RELEASED_IMAGE_SIZE
    vq.hash = file_hash(path)
    return vq


def _fits(name: str, weights: dict[str, Tensor]) -> bool:
    with torch.device("meta"):
        own = VQModel(**preset(name)).state_dict()
    return {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in weights.items()}


def _blank(options: dict) -> ImageTokenizer:
    """Build a model without memory for its weights, and without a draw from the global random generator."""
    sizes = {name: value for name, value in options.items() if name != "architecture"}
    with torch.device("meta"):
        return NETWORKS[options.get("architecture", "vq")](**sizes)
