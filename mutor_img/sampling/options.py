"""The flags that decide samples, shared by every command that makes images from a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection

import torch

from mutor_img.checkpoints.folder import newest_of
from mutor_img.checkpoints.loading import Loaded, load_run
from mutor_img.common.cli import parse_grid
from mutor_img.common.errors import UserError, check_choice, check_range
from mutor_img.decoding.drafting import SOURCES, Draft
from mutor_img.decoding.guidance import SCHEDULES
from mutor_img.decoding.sampler import SamplingSettings
from mutor_img.sampling.labels import RULES, parse_classes, readable_names
from mutor_img.sampling.pictures import open_tokenizer, verified_tokenizer
from mutor_img.sampling.source import SampleSource
from mutor_img.training.runtime import Runtime
from tokenizer.network.interface import ImageTokenizer

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

    add("--tokenizer", metavar="PATH", help="tokenizer folder, hf://org/name or released file (default: the one that "
                                            "the run names)")
    add("--grid-size", metavar="HxW", help="rows x columns of codes, for a LlamaGen .pt that does not contain them "
                                           "(16x16; 24x24 for its 384-pixel weights)")
    add("--fallback", action="store_true", help="if a run's newest checkpoint is damaged, take its newest intact one")
    add("--resize", type=int, metavar="PIXELS", help="shrink images to this side length before they are written or "
                                                     "scored; LlamaGen scores its 384-pixel weights at 256")
    add("--weights", default="auto", metavar="WHICH", help="ema, raw, or auto: ema if the run has them")
    add("--classes", metavar="LIST", help="names or numbers of classes, comma-separated (default: all; for a grid at "
                                          "most ten); write name:10 or label:10 if 10 can mean both")
    add("--labels", default="random", metavar="RULE", help="random: one drawn for each sample; balanced: "
                                                                  "the same number of each class")
    add("--seed", type=int, default=0, help="seed of the labels and the random streams")
    add("--cfg-scale", type=float, default=2.0, help="guidance scale; 1: no guidance")
    add("--cfg-schedule", default="constant", metavar="NAME", help="how guidance changes over the tokens: "
                                                                    f"{', '.join(SCHEDULES)}")
    add("--cfg-parameter", type=float, help="for interval: n (the first n + 2 tokens are guided); for power-cosine: "
                                            "the power")
    add("--temperature", type=float, default=1.0, help="divides the logits")
    add("--top-k", type=int, default=0, help="sample only from the k most likely codes; 0: from all")
    add("--top-p", type=float, default=1.0, help="sample only from the most likely codes with this total "
                                                     "probability; 1: from all")
    add("--dtype", default="auto", metavar="TYPE", help="dtype of the generator: fp32, bf16, or auto: bf16 on "
                                                                "CUDA, else fp32")
    add("--draft", default="off", metavar="W", help="off; auto: drafts only where they are faster; or W: inputs per "
                                                    "image and pass of the network, W - 1 of them drafts. Changes no "
                                                    "image")
    add("--draft-source", default=Draft.source, metavar="NAME", help="where the first drafts come from: "
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
    path = runtime.from_main(lambda: newest_of(args.checkpoint, args.fallback))
    loaded = load_run(path, ema=WEIGHTS[args.weights], device=runtime.device, dtype=DTYPES[name], grid=grid)
    if loaded.guessed_grid and runtime.is_main:
        print(guess_of(loaded), file=sys.stderr)
    settings = SamplingSettings(args.cfg_scale, args.cfg_schedule, args.cfg_parameter, args.temperature, args.top_k,
                                args.top_p, args.seed)
    settings.validate(loaded.model.config)
    asked = Draft.parse(args.draft, args.draft_source)
    draft = asked.fit(loaded.model.config)
    if draft.source != asked.source and runtime.is_main:
        print(f"note: {loaded.path} was trained without registers; the first drafts come from the {draft.source} "
              f"(--draft-source {draft.source})", file=sys.stderr)
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


def _smaller(side: int, loaded: Loaded, tokenizer: ImageTokenizer) -> int | None:
    """Return ``--resize`` once it is checked; None: the images are of that size."""
    height, width = (cells * tokenizer.downsample for cells in loaded.model.config.grid)
    if height != width:
        raise UserError(f"--resize {side}: the images are {width} x {height} pixels, and only square ones are shrunk; "
                        "leave it out")
    if side > height:
        raise UserError(f"--resize {side}: the images are {height} pixels per side and are not made larger; give fewer")
    return side if side < height else None


def _tokenizer(path: str | None, loaded: Loaded, runtime: Runtime) -> ImageTokenizer:
    """Load the tokenizer: the run's own, verified, or the one that the user insists on."""
    if path is None:
        return verified_tokenizer(loaded.codes, runtime.device, loaded.model.config, loaded.path)
    vq = open_tokenizer(path, runtime.device, loaded.model.config, loaded.codes, loaded.path)
    expected = loaded.codes.get("tokenizer_hash", vq.hash)
    if vq.hash != expected and runtime.is_main:
        print(f"warning: {path} has sha256 {vq.hash[:16]}, but the codes of {loaded.path} were made by a tokenizer "
              f"with {expected[:16]}", file=sys.stderr)
    return vq
