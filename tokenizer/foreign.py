"""Tokenizers of other families: the only place that knows the names of their weights.

Both name the blocks of a level ``encoder.down.<level>.block.<number>``, so that a file tells the sizes of its network.
taming-transformers (arXiv 2012.09841) and LlamaGen build one network and name it differently. MaskGIT's (arXiv
2202.04200), in the PyTorch form that 1d-tokenizer and open-muse share, is built here under its own names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mutor_img.checkpoints.folder import load_strict
from mutor_img.common.errors import UserError
from tokenizer.network.interface import ImageTokenizer
from tokenizer.network.maskgit import MaskGITModel
from tokenizer.network.quantizer import USED_SLOTS
from tokenizer.network.vq import VQModel

_USED = "quantize.codebook_used"  # a buffer of ours and LlamaGen's; no other file has it
_TRAINING = "loss."  # in taming-transformers' files: LPIPS and the discriminator
_RULES = (  # ours, and taming-transformers' (its decoder counts levels from full resolution: see taming_name)
    (r"(encoder|decoder)\.mid\.0\.", r"\1.mid.block_1."), (r"(encoder|decoder)\.mid\.1\.", r"\1.mid.attn_1."),
    (r"(encoder|decoder)\.mid\.2\.", r"\1.mid.block_2."), (r"encoder\.conv_blocks\.", "encoder.down."),
    (r"(down\.\d+|up\.\d+)\.res\.", r"\1.block."),
)
_UNFIT = {  # names of weights that tell a tokenizer without one grid of codes, or with another way to choose them
    "latent_tokens": "TiTok's, whose codes are a list without rows and columns",
    "quantize.quant_resi.": "VAR's, which has several grids of codes for one image",
    "quantize.proj.": "a Gumbel VQGAN, which draws its codes from logits",
}


def taming_name(name: str, levels: int) -> str:
    """Return taming-transformers' name of a weight of :class:`~tokenizer.network.vq.VQModel` with so many levels."""
    name = re.sub(r"decoder\.conv_blocks\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name)
    for pattern, theirs in _RULES:
        name = re.sub(pattern, theirs, name)
    return name


def load_foreign(weights: dict[str, Tensor], path: str | Path) -> ImageTokenizer | None:
    """Return the tokenizer that a file of taming-transformers or MaskGIT holds; None for a file of neither.

    Args:
        weights: by the names in the file.
        path: the file, for errors.

    Raises:
        UserError: a weight is missing, unknown or of another shape, or the network is one that does not fit.
    """
    for prefix, what in _UNFIT.items():
        if any(name.startswith(prefix) for name in weights):
            raise UserError(f"{path}: this tokenizer is {what}; it cannot be used here (docs/tokenizer.md says which "
                            "can)")
    maskgit = "encoder.mid.0.conv1.weight" in weights
    if not maskgit and "encoder.mid.block_1.conv1.weight" not in weights:
        return None
    try:
        options = _sizes(weights, maskgit)
        with torch.device("meta"):
            model = MaskGITModel(**options) if maskgit else VQModel(**options)
    except (KeyError, IndexError, ZeroDivisionError, ValueError) as error:
        raise UserError(f"{path}: weights of no known tokenizer ({error})") from None
    names = file_names(model.options, model.state_dict())
    for missing in set(names.values()) - weights.keys():
        raise UserError(f"{path}: weight {missing!r} is missing; the file is of another model")
    for unknown in weights.keys() - set(names.values()):
        if maskgit or not unknown.startswith(_TRAINING):
            raise UserError(f"{path}: unknown weight {unknown!r}; the file is of another model")
    ours = {name: weights[theirs] for name, theirs in names.items()}
    model.to_empty(device="cpu")
    load_strict(model, {**ours, _USED: torch.zeros(max(USED_SLOTS, model.vocabulary))}, path)
    return model


def file_names(options: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, str]:
    """Return the name in the authors' files of each weight of a tokenizer that they have, by its name here.

    Args:
        options: the tokenizer's.
        weights: its state dict.
    """
    if _is_llamagen(options):
        return {name: name for name in weights}
    theirs = (lambda name: name) if "architecture" in options else (
        lambda name: taming_name(name, len(options["multipliers"])))
    return {name: theirs(name) for name in weights if name != _USED}


def file_content(options: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return what the authors' file of a tokenizer holds: weights under ``model``, under ``state_dict``, or flat."""
    found = {theirs: weights[name] for name, theirs in file_names(options, weights).items()}
    if "architecture" in options:
        return found
    return {"model" if _is_llamagen(options) else "state_dict": found}


def _is_llamagen(options: dict[str, Any]) -> bool:
    return options.get("unit_codes", True) and "architecture" not in options


def _sizes(weights: dict[str, Tensor], maskgit: bool) -> dict[str, Any]:
    """Return the options of the network that has these weights.

    Raises:
        KeyError, IndexError, ValueError, ZeroDivisionError: there is none.
    """
    def count(form: str) -> int:
        return next(number for number in range(len(weights) + 1) if form.format(number) not in weights)

    levels = range(count("encoder.down.{}.block.0.conv1.weight"))
    channels, image_channels = weights["encoder.conv_in.weight"].shape[:2]
    latent_channels = weights["encoder.conv_out.weight"].shape[0]
    vocabulary, code_dim = weights["quantize.embedding.weight"].shape
    sizes = {
        "image_channels": image_channels, "channels": channels, "vocabulary": vocabulary, "code_dim": code_dim,
        "multipliers": [weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] // channels for level in levels],
        "blocks": count("encoder.down.0.block.{}.conv1.weight"),
    }
    return sizes if maskgit else {**sizes, "latent_channels": latent_channels, "unit_codes": False}
