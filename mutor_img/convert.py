"""``python -m mutor_img.convert``: weights between the authors' files and this project's checkpoints, both ways."""

from __future__ import annotations

if __name__ == "__main__":
    from mutor_img.common.threads import set_spinning

    set_spinning()  # before torch is loaded

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mutor_img.common.own_tokenizer  # noqa: F401 (first: what follows imports tokenizer)
from mutor_img.blocks import ModelConfig, RotaryTable
from mutor_img.checkpoints.folder import find_checkpoint, read_meta, write_checkpoint
from mutor_img.checkpoints.llamagen import read_pt
from mutor_img.checkpoints.loading import config_from_weights, load_run
from mutor_img.common.cli import Parser, parse_grid, run
from mutor_img.common.errors import UserError, check_choice
from mutor_img.common.files import filling, write_atomic
from mutor_img.common.locks import claim, file_lock
from mutor_img.common.outputs import keep_apart
from mutor_img.sampling.options import WEIGHTS, guess_of
from tokenizer import load_tokenizer
from tokenizer.foreign import file_content


def is_tokenizer(path: Path) -> bool:
    """Tell whether a checkpoint or released file holds a tokenizer; else it must be a generator."""
    if path.is_file():
        return any(name.startswith("quantize.") for name in read_pt(path))
    return read_meta(find_checkpoint(path)).get("kind") == "tokenizer"


def read_any(path: Path, ema: bool | None, grid: tuple[int, int] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of a generator or a tokenizer by their names, and the metadata of a checkpoint of them.

    Reading builds the model and loads it strictly, so that what comes out is complete and fits.

    Raises:
        UserError: the file is missing, damaged, or of neither kind.
    """
    if is_tokenizer(path):
        if ema is not None or grid is not None:
            raise UserError(f"{path}: a tokenizer; --weights and --grid-size are for generators")
        vq = load_tokenizer(path)
        return vq.state_dict(), {"kind": "tokenizer", "model": vq.options, "image_size": vq.image_size}
    loaded = load_run(path, ema=ema, grid=grid)
    if loaded.guessed_grid:
        print(guess_of(loaded), file=sys.stderr)
    meta = {"kind": "generator", "model": loaded.model.config.to_json(), "codes": loaded.codes}
    return loaded.model.state_dict(), meta


def rotary_table(meta: dict[str, Any]) -> dict[str, Tensor]:
    """Return LlamaGen's ``freqs_cis``, (1 + N, head_dim / 2, 2): by its rows a ``.pt`` says the grid of its codes."""
    config = ModelConfig.from_json(meta["model"])
    if config.grid[0] != config.grid[1]:
        return {}  # its rows would say another grid
    return {"freqs_cis": RotaryTable(config.grid, config.dim // config.heads).factors()}


def check_layout(source: str, weights: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Raise :class:`UserError` for a generator that a ``.pt`` in LlamaGen's layout would give back as another model.

    Heads and grid can be named when it is read; where they must be, a note says so.
    """
    config = ModelConfig.from_json(meta["model"])
    read = config_from_weights(weights, source, config.grid)
    for name, words in (("qk_norm", "QK-norm (model.qk_norm)"),
                        ("register_offsets", f"registers at offsets {list(config.register_offsets or ())}")):
        if getattr(config, name) != getattr(read, name):
            raise UserError(f"{source}: has {words}, which a .pt in LlamaGen's layout cannot say; give an --out that "
                            "does not end in .pt")
    if config.heads != read.heads:
        print(f"note: a .pt in LlamaGen's layout does not say its heads: load this one by load_checkpoint(..., "
              f"heads={config.heads})", file=sys.stderr)
    if config.grid[0] != config.grid[1]:
        print(f"note: a .pt in LlamaGen's layout does not say such a grid: sample this one with --grid-size "
              f"{config.grid[0]}x{config.grid[1]}", file=sys.stderr)


def main(argv: Sequence[str]) -> None:
    """Convert one file or folder, and report every weight."""
    parser = Parser(
        description="Convert released weights (.pt, .ckpt, .bin) to a checkpoint of this project, or a checkpoint to a "
                    ".pt in its authors' layout. Takes LlamaGen's generators and tokenizers, and the tokenizers of "
                    "taming-transformers and MaskGIT. Lists every weight; one that does not fit is an error.",
        example="python -m mutor_img.convert --source c2i_B_256.pt --out runs/llamagen_b\n"
                "python -m mutor_img.convert --source runs/imagenet256/mutor2d_b_80 --out mutor2d_b_80.pt",
    )
    parser.add_argument("--source", required=True, metavar="PATH", help="released file, run folder, checkpoint folder, "
                                                                        "or hf://org/name")
    parser.add_argument("--out", required=True, metavar="PATH", help="run folder to write, or a path that ends in .pt")
    parser.add_argument("--weights", default="auto", metavar="WHICH", help="ema, raw, or auto: ema if a checkpoint has "
                                                                           "any; raw of a .pt")
    parser.add_argument("--grid-size", "--grid", metavar="HxW", help="rows x columns of a .pt generator's codes, if "
                                                                   "the file does not contain them (16x16)")
    args = parser.parse_args(argv)
    check_choice("--weights", args.weights, tuple(WEIGHTS))
    out = Path(args.out)
    keep_apart({"--out": out}, {"--source": args.source})
    grid = None if args.grid_size is None else parse_grid(args.grid_size, "--grid-size")
    with claim(file_lock(out, keeps=True)):
        if out.exists():
            raise UserError(f"{out} exists already; give another --out or remove it")
        weights, meta = read_any(Path(args.source), WEIGHTS[args.weights], grid)
        if out.suffix == ".pt":
            if meta["kind"] == "generator":
                check_layout(args.source, weights, meta)
                content = {"model": {**weights, **rotary_table(meta)}}
            else:
                content = file_content(meta["model"], weights)
            write_atomic(out, lambda aside: torch.save(content, aside))
        else:
            with filling(out) as aside:
                write_checkpoint(aside, 0, {"model": weights}, {"seconds": 0.0, "samples": 0, **meta}, keep=1)
    for name, tensor in weights.items():
        print(f"{name:<60} {' x '.join(map(str, tensor.shape)):<24} {str(tensor.dtype).removeprefix('torch.')}")
    count = sum(t.numel() for t in weights.values())
    print(f"{meta['kind']}: {len(weights)} weights, {count:,} numbers, {args.source} -> {out}")


if __name__ == "__main__":
    run(main)
