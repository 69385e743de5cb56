"""The flags that decide samples, shared by every command that makes images from a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection

import torch

from mutor_img.checkpoints.folder import newest_of
from mutor_img.checkpoints.loading import Loaded, load_run
from mutor_img.common.cli import parse_grid
from mutor_img.common.config import check_choice
from mutor_img.common.errors import UserError, check_range
from mutor_img.decoding.drafting import SOURCES, Draft
from mutor_img.decoding.guidance import SCHEDULES
from mutor_img.decoding.sampler import SamplingSettings
from mutor_img.sampling.labels import RULES, parse_classes, readable_names
from mutor_img.sampling.pictures import open_tokenizer, verified_tokenizer
from mutor_img.sampling.source import SampleSource
from mutor_img.training.runtime import Runtime
from tokenizer.network.vq import VQModel

WEIGHTS = {"auto": None, "ema": True, "raw": False}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_sampling_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup,
                       without: Collection[str] = ()) -> list[str]:
    """Add the flags that decide samples to a parser or a group of one; returns their names once parsed.

    Args:
        parser: takes the flags.
        without: flags to leave out, which the caller sets before :func:`open_source`.
    """
    before = {action.dest for action in parser._actions}

    def add(flag: str, **options) -> None:
        if flag not in without:
            parser.add_argument(flag, **options)

    add("--tokenizer", metavar="PATH", help="tokenizer folder or LlamaGen .pt; the one the run names unless given")
    add("--grid-size", metavar="HxW", help="rows x columns of codes of a LlamaGen .pt that does not say them (16x16; "
                                           "24x24 for its 384-pixel weights)")
    add("--resize", type=int, metavar="PIXELS", help="shrink images to this side before they are written or scored, as "
                                                     "LlamaGen scores 384-pixel weights at 256")
    add("--weights", default="auto", metavar="WHICH", help="ema, raw, or auto: ema where a run has them")
    add("--classes", metavar="LIST", help="names or numbers of classes, comma-separated; all unless given (for a grid "
                                          "at most ten); name:10 and label:10 where 10 may be both")
    add("--labels", default="random", metavar="RULE", help="random: drawn for each sample; balanced: as many of each")
    add("--seed", type=int, default=0, help="of labels and random streams")
    add("--cfg-scale", type=float, default=2.0, help="guidance scale; 1: none")
    add("--cfg-schedule", default="constant", metavar="NAME", help=f"guidance over the tokens: {', '.join(SCHEDULES)}")
    add("--cfg-parameter", type=float, help="interval: n, the first n + 2 tokens are guided; power-cosine: the power")
    add("--temperature", type=float, default=1.0, help="divides the logits")
    add("--top-k", type=int, default=0, help="the k most likely codes only; 0: all")
    add("--top-p", type=float, default=1.0, help="the most likely codes that hold this mass; 1: all")
    add("--dtype", default="auto", metavar="TYPE", help="of the generator: fp32, bf16, or auto: bf16 on CUDA")
    add("--draft", default="off", metavar="W", help="the codes that a pass of the network drafts and verifies for each "
                                                    "image, off, or auto: where it costs nothing; changes no image")
    add("--draft-source", default=Draft.source, metavar="NAME", help=f"where first drafts come from: "
                                                                     f"{', '.join(SOURCES)}")
    return [action.dest for action in parser._actions if action.dest not in before]


def check_sampling_flags(args: argparse.Namespace) -> None:
    """Raise :class:`~mutor_img.common.errors.UserError` for a word that is none of the known ones."""
    check_choice("--weights", args.weights, tuple(WEIGHTS))
    check_choice("--labels", args.labels, RULES)
    check_choice("--dtype", args.dtype, ("auto", *DTYPES))
    Draft.parse(args.draft, args.draft_source)
    if args.resize is not None:
        check_range("--resize", args.resize, 1, 65536)
    if args.grid_size is not None:
        parse_grid(args.grid_size, "--grid-size")


def open_source(args: argparse.Namespace, runtime: Runtime) -> SampleSource:
    """Load what ``--checkpoint`` and the sampling flags name, on the runtime's device.

    Raises:
        UserError: a value out of range, a checkpoint, a tokenizer or a class that is not there, or processes that have
            other ones.
    """
    name = ("bf16" if runtime.device.type == "cuda" else "fp32") if args.dtype == "auto" else args.dtype
    grid = None if args.grid_size is None else parse_grid(args.grid_size, "--grid-size")
    # Of a run that trains on the newest checkpoint changes while processes look.
    path = runtime.from_main(lambda: str(newest_of(args.checkpoint)))
    loaded = load_run(path, ema=WEIGHTS[args.weights], device=runtime.device, dtype=DTYPES[name], grid=grid)
    if loaded.guessed_grid and runtime.is_main:
        print(guess_of(loaded), file=sys.stderr)
    settings = SamplingSettings(args.cfg_scale, args.cfg_schedule, args.cfg_parameter, args.temperature, args.top_k,
                                args.top_p, args.seed)
    settings.validate(loaded.model.config.vocabulary)
    draft = Draft.parse(args.draft, args.draft_source)
    draft.validate(loaded.model.config)
    unknown = sorted(set(draft.offsets) - set(loaded.trained_offsets or draft.offsets))
    if unknown and runtime.is_main:
        print(f"note: {loaded.path} was not trained with registers of offset {', '.join(map(str, unknown))}, which "
              f"--draft {args.draft} uses; the images stay the same, but more drafts may be wrong", file=sys.stderr)
    run_names = loaded.codes.get("class_names")
    names = readable_names(run_names, loaded.model.config.classes)
    classes = parse_classes(args.classes, names, run_names) if args.classes is not None else None
    tokenizer = _tokenizer(args.tokenizer, loaded, runtime)
    resize = None if args.resize is None else _smaller(args.resize, loaded, tokenizer)
    source = SampleSource(loaded, tokenizer, settings, args.labels, classes, names, name, resize, draft)
    if runtime.world > 1:  # else no reason to hash a .pt
        runtime.agree(source.identity(0))
    return source


def guess_of(loaded: Loaded) -> str:
    """Return the line that says which grid of codes is assumed of a file that does not say it."""
    rows, columns = loaded.model.config.grid
    return (f"note: {loaded.path} does not say its grid of codes: {rows} x {columns} is assumed, which is 256 pixels "
            "of LlamaGen's; --grid-size 24x24 is for its 384-pixel weights")


def _smaller(side: int, loaded: Loaded, tokenizer: VQModel) -> int | None:
    """Return ``--resize`` once it is checked; None: the images are of that size."""
    height, width = (cells * tokenizer.downsample for cells in loaded.model.config.grid)
    if height != width:
        raise UserError(f"--resize {side}: the images are {width} x {height} pixels, and only square ones are shrunk; "
                        "leave it out")
    if side > height:
        raise UserError(f"--resize {side}: the images are {height} pixels a side, and are not made larger; give fewer")
    return side if side < height else None


def _tokenizer(path: str | None, loaded: Loaded, runtime: Runtime) -> VQModel:
    """Load the tokenizer: the run's own, verified, or the one that the user insists on."""
    if path is None:
        return verified_tokenizer(loaded.codes, runtime.device, loaded.model, loaded.path)
    vq = open_tokenizer(path, runtime.device, loaded.model, loaded.codes, loaded.path)
    expected = loaded.codes.get("tokenizer_hash", vq.hash)
    if vq.hash != expected and runtime.is_main:
        print(f"warning: {path} has sha256 {vq.hash[:16]}, but the codes of {loaded.path} were made by a tokenizer "
              f"with {expected[:16]}", file=sys.stderr)
    return vq
