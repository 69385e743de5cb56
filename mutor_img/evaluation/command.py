"""The scoring command: flags in, a table on the terminal and a JSON file out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from mutor_img.common import cli
from mutor_img.common.errors import UserError, check_choice, check_range
from mutor_img.common.files import write_sealed
from mutor_img.common.locks import file_lock
from mutor_img.common.outputs import keep_apart, keep_unseen
from mutor_img.evaluation.networks import (
    add_network_flags,
    check_network_flags,
    load_network,
    network_files,
    parse_metrics,
)
from mutor_img.metrics.evaluator import check_sets, check_source, evaluate, make_reference
from mutor_img.metrics.inception_score import ORDERS
from mutor_img.metrics.references import ROLES, open_reference
from mutor_img.metrics.report import table
from mutor_img.metrics.requirements import METRICS, OPTIONAL
from mutor_img.metrics.samples import manifest_of, open_samples
from mutor_img.metrics.views import Resized
from mutor_img.sampling.options import add_sampling_flags, check_sampling_flags, open_source
from mutor_img.sampling.source import GeneratedImages
from mutor_img.training.runtime import Runtime

SAMPLES = 50_000  # of --checkpoint, unless --num-samples is given


def _parser() -> tuple[cli.Parser, list[str]]:
    """Return the parser and the names of the sampling flags."""
    parser = cli.Parser(
        description="Score generated images: FID, sFID, Inception Score, precision and recall under ADM's protocol.",
        example="python evaluate_fid.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz "
                "--num-samples 50000 --json scores.json\n"
                "python evaluate_fid.py --checkpoint runs/imagenet256/mutor2d_b_80 --cfg-scale 2.0 "
                "--reference VIRTUAL_imagenet256_labeled.npz\n"
                "python evaluate_fid.py --make-reference imagenet/train_256_png --role generation --out train.npz")
    add = parser.add_argument
    add("--samples", metavar="PATH", help="npz (arr_0 uint8 NHWC, arr_1 labels) or folder of PNGs")
    add("--checkpoint", metavar="PATH", help="run folder, checkpoint folder, hf://org/name or LlamaGen .pt: generate "
                                             "the images of sample.py and score them as they come, without storing "
                                             "them")
    add("--reference", metavar="PATH", help="ADM npz, statistics npz (ours, or mu and sigma), images npz or PNG folder")
    add("--split", metavar="NAME", help="which split of --reference or --make-reference to use, if that folder holds "
                                        "several")
    add("--metrics", metavar="LIST", help=f"some of {','.join((*METRICS, *OPTIONAL))}; default: all of "
                                          f"{','.join(METRICS)} that the reference allows")
    add("--num-samples", type=int, metavar="N", help="score N images, drawn by seed from all that there are; fewer is "
                                                     "an error (default: all, or 50000 with --checkpoint)")
    add("--held-out", metavar="PATH", help="real images that are not in the reference; they are scored too, beside as "
                                           "many samples")
    add("--is-order", default="shuffle", metavar="ORDER", help="order in which images are put into chunks for "
                                                                      f"the Inception Score: {' or '.join(ORDERS)}")
    add("--role", metavar="ROLE", help=f"what is scored, or what the new reference is for: {' or '.join(ROLES)} "
                                       "(default when scoring: generation)")
    add("--force-role", action="store_true", help="use a reference even if it has the other role")
    add("--json", metavar="FILE", help="JSON file to write: the scores and where they come from")
    add("--make-reference", metavar="PATH", help="instead of scoring, write a statistics file of these images")
    add("--out", metavar="FILE", help="the statistics file that --make-reference writes")
    add_network_flags(parser)
    return parser, add_sampling_flags(parser.add_argument_group("samples of --checkpoint, as in sample.py"))


def main(argv: Sequence[str]) -> dict[str, Any]:
    """The command; see ``--help``. Returns what the JSON file holds (empty on ranks other than 0).

    Raises:
        UserError: a mistake in the flags or in the files they name.
    """
    parser, sampling = _parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    if not args.checkpoint:
        taken = [name for name in sampling if name != "resize" or args.make_reference]
        parser.refuse(args, taken, "has no use without --checkpoint")
    keep_apart(_outputs(args), _inputs(args))
    runtime = Runtime.on(args.device)
    with runtime.one_voice(), runtime.claim(file_lock(args.json), file_lock(args.out)):
        return _score(args, runtime)


def _score(args: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """Make the reference or the scores that the flags ask for; returns what the JSON file holds."""
    options = {"batch_size": args.batch_size, "progress": True}
    # The network comes last: it may have to be downloaded, which a mistyped path need not wait for.
    if args.make_reference:
        source = open_reference(args.make_reference, args.split)
        check_source(source, args.role)
        if make_reference(source, load_network(args, runtime), args.role, args.out, **options) is not None:
            print(f"reference of {args.make_reference} for {args.role} -> {args.out}")
        return {}
    if args.checkpoint:
        made = open_source(args, runtime)
        keep_apart(_outputs(args), {"the tokenizer": made.tokenizer.path})
        samples = GeneratedImages(made, args.num_samples or SAMPLES, args.batch_size)
    else:
        samples = open_samples(args.samples)
        samples = samples if args.resize is None else Resized(samples, args.resize)
    reference = open_reference(args.reference, args.split)
    sets = {"num_samples": args.num_samples, "role": args.role or "generation", "force_role": args.force_role,
            "held_out": None if args.held_out is None else open_samples(args.held_out)}
    check_sets(samples, reference, **sets)
    result = evaluate(samples, reference, load_network(args, runtime), metrics=parse_metrics(args.metrics),
                      is_order=args.is_order, **sets, **options)
    if result:
        for warning in result["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
        print(table(result), flush=True)  # before the file: what took an hour is not lost to a folder that is gone
        if args.json:
            write_sealed(args.json, result)
    return result


def _check(parser: cli.Parser, args: argparse.Namespace) -> None:
    """Refuse what cannot be meant before anything is read."""
    for name, value, known in (("--is-order", args.is_order, ORDERS), ("--role", args.role, ROLES)):
        if value is not None:
            check_choice(name, value, known)
    check_network_flags(args)
    check_sampling_flags(args)
    parse_metrics(args.metrics)
    if args.num_samples is not None:
        check_range("--num-samples", args.num_samples, 2, 10**9)
    if args.make_reference:
        parser.refuse(args, ("samples", "checkpoint", "reference", "num_samples", "metrics", "held_out", "json",
                             "force_role", "is_order"), "has no use with --make-reference")
        if not args.out or not args.role:
            raise UserError(f"--make-reference needs --role ({' or '.join(ROLES)}) and --out FILE")
        return
    if args.out:
        raise UserError("--out is for --make-reference; the scores are written by --json FILE")
    if args.samples and args.checkpoint:
        raise UserError("--samples and --checkpoint exclude each other; give the one to score")
    if not args.samples and not args.checkpoint:
        raise UserError("--samples is missing, or --checkpoint to generate them (see --help)")
    if not args.reference:
        raise UserError("--reference is missing (see --help)")
    for flag, path in (("--reference", args.reference), ("--samples", args.samples)):
        if args.held_out and path:
            keep_unseen("--held-out", args.held_out, flag, path)


def _outputs(args: argparse.Namespace) -> dict[str, str | None]:
    return {"--json": args.json, "--out": args.out}


def _inputs(args: argparse.Namespace) -> dict[str, Any]:
    """Return every path that is read, by its flag."""
    paths = {f"--{name.replace('_', '-')}": getattr(args, name)
             for name in ("samples", "held_out", "checkpoint", "tokenizer", "reference", "make_reference")}
    for name in ("--samples", "--held-out"):
        if paths[name]:
            paths[f"the manifest of {name}"] = manifest_of(paths[name])
    return {**paths, **network_files(args)}
