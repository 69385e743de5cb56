"""The scoring command: flags in, a table on the terminal and a JSON file out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mutor_img import cli
from mutor_img.errors import UserError, check_range, suggest
from mutor_img.files import write_json
from mutor_img.metrics.digits import DEFAULT_FOLDER, load_digits
from mutor_img.metrics.evaluator import METRICS, evaluate, frechet_key, make_reference
from mutor_img.metrics.features import FeatureNetwork, load_inception
from mutor_img.metrics.inception_score import ORDERS
from mutor_img.metrics.references import ROLES, open_reference
from mutor_img.metrics.samples import open_samples

FEATURES = ("inception", "mnist")


def _parser() -> cli.Parser:
    parser = cli.Parser(
        description="Score generated images: FID, sFID, Inception Score, precision and recall under ADM's protocol.",
        example="python evaluate_fid.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz "
                "--num-samples 50000 --json scores.json\n"
                "python evaluate_fid.py --make-reference imagenet/train_256_png --role generation --out train.npz")
    add = parser.add_argument
    add("--samples", metavar="PATH", help="npz (arr_0 uint8 NHWC, arr_1 labels) or folder of PNGs")
    add("--reference", metavar="PATH", help="ADM npz, statistics npz (ours, or mu and sigma), images npz or PNG folder")
    add("--metrics", metavar="LIST", help=f"some of {','.join(METRICS)}; all that the reference allows if not given")
    add("--num-samples", type=int, metavar="N", help="score the first N; fewer is an error; all if not given")
    add("--held-out", metavar="PATH", help="real images outside the reference, scored at the same number beside it")
    add("--features", default="inception", metavar="NAME", help=f"feature network: {' or '.join(FEATURES)}")
    add("--features-weights", metavar="FOLDER", help=f"digit classifier of --features mnist ({DEFAULT_FOLDER})")
    add("--inception-weights", metavar="FILE", help="Inception weights elsewhere than in torch's hub folder")
    add("--is-order", default="shuffle", metavar="ORDER", help=f"Inception Score chunks by {' or '.join(ORDERS)}")
    add("--role", metavar="ROLE", help=f"what is scored, or made a reference for: {' or '.join(ROLES)}; generation "
                                       "when scoring, unless given")
    add("--force-role", action="store_true", help="score against a reference of the other role all the same")
    add("--json", metavar="FILE", help="write the scores and where they come from")
    add("--make-reference", metavar="PATH", help="write a statistics file of these images instead of scoring")
    add("--out", metavar="FILE", help="the statistics file of --make-reference")
    add("--batch-size", type=int, default=64, help="images a process at once")
    add("--device", help="cpu, cuda or cuda:N; CUDA if there is one, else the CPU")
    return parser


def main(argv: Sequence[str]) -> dict[str, Any]:
    """The command; see ``--help``. Returns what the JSON file holds (empty on ranks other than 0).

    Raises:
        UserError: a mistake in the flags or in the files they name.
    """
    args = _parser().parse_args(argv)
    _check(args)
    network = _network(args)
    options = {"batch_size": args.batch_size, "progress": True}
    if args.make_reference:
        source = open_reference(args.make_reference)
        if make_reference(source, network, args.role, args.out, **options) is not None:
            print(f"reference of {args.make_reference} for {args.role} -> {args.out}")
        return {}
    result = evaluate(
        open_samples(args.samples), open_reference(args.reference), network, metrics=_metrics(args.metrics),
        num_samples=args.num_samples, held_out=None if args.held_out is None else open_samples(args.held_out),
        role=args.role or "generation", force_role=args.force_role, is_order=args.is_order, **options)
    if result:
        if args.json:
            write_json(args.json, result)
        for warning in result["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
        print(table(result, frechet_key(network)))
    return result


def entry() -> None:
    """Console entry."""
    cli.run(main)


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant before anything is read."""
    for name, value, known in (("--features", args.features, FEATURES), ("--is-order", args.is_order, ORDERS),
                               ("--role", args.role, ROLES)):
        if value is not None and value not in known:
            raise UserError(f"{name} {value!r} is unknown{suggest(value, known)}")
    check_range("--batch-size", args.batch_size, 1, 100_000)
    _metrics(args.metrics)
    if args.features_weights and args.features == "inception":
        raise UserError("--features-weights is for --features mnist; Inception's file is given by --inception-weights")
    if args.inception_weights and args.features != "inception":
        raise UserError(f"--inception-weights has no use with --features {args.features}")
    making = {"--make-reference": args.make_reference, "--out": args.out}
    scoring = {"--samples": args.samples, "--reference": args.reference, "--num-samples": args.num_samples,
               "--metrics": args.metrics, "--held-out": args.held_out, "--json": args.json,
               "--force-role": args.force_role or None}
    if args.make_reference:
        unused = [name for name, value in scoring.items() if value is not None]
        if unused:
            raise UserError(f"{unused[0]} has no use with --make-reference")
        if not args.out or not args.role:
            raise UserError(f"--make-reference needs --role ({' or '.join(ROLES)}) and --out FILE")
        return
    if making["--out"]:
        raise UserError("--out is for --make-reference; the scores are written by --json FILE")
    for name in ("--samples", "--reference"):
        if not scoring[name]:
            raise UserError(f"{name} is missing (see --help)")
    if args.json and Path(args.json).is_dir():
        raise UserError(f"--json {args.json} is a folder; give a file name")


def _metrics(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}{suggest(name, METRICS)}")
    if not names:
        raise UserError(f"--metrics is empty; choose from {','.join(METRICS)}")
    return names


def _network(args: argparse.Namespace) -> FeatureNetwork:
    """Load the feature network on this process's device, the main process first where it may have to download."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        state = PartialState(cpu=args.device == "cpu")
        device = state.device
        with state.main_process_first():
            return _load(args, device)
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {args.device!r} is no device; give cpu, cuda or cuda:N") from None
    devices = {"cpu": 1, "cuda": torch.cuda.device_count()}
    if (device.index or 0) >= devices.get(device.type, 0):
        raise UserError(f"--device {args.device}: there is no such device here ({torch.cuda.device_count()} CUDA "
                        "devices); give another or leave it out")
    return _load(args, device)


def _load(args: argparse.Namespace, device: torch.device) -> FeatureNetwork:
    if args.features == "mnist":
        return load_digits(args.features_weights or DEFAULT_FOLDER, device)
    return load_inception(args.inception_weights, device)


def _shortened(count: int) -> str:
    """50000 -> "50k", 1500 -> "1500"."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def table(result: dict[str, Any], frechet: str) -> str:
    """Return the scores as lines for a person; the columns are the samples and, if scored, the held-out images."""
    columns = {"samples": result}
    if "real_against_real" in result:
        if result["samples_at_same_n"]["num_samples"] != result["num_samples"]:
            columns["samples, same N"] = result["samples_at_same_n"]
        columns["held-out real"] = result["real_against_real"]
    size = _shortened(result["num_samples"])
    names = {frechet: f"{'FID' if frechet == 'fid' else 'FD'}-{size}", "sfid": f"sFID-{size}", "is": "Inception Score",
             "precision": "precision", "recall": "recall", "recognised": "recognised", "distinct": "distinct",
             "nearest_training_distance": "nearest training image", "nearer_than_held_out": "nearer than any held-out",
             "nearer_by_chance": "nearer by chance", "num_samples": "images (N)"}
    if len(columns) > 1:  # a column of another N must not stand under the name of this one
        names |= {frechet: names[frechet].split("-")[0], "sfid": "sFID"}
    rows = [["", *columns]]
    for key, name in names.items():
        if key in result or any(key in column for column in columns.values()):
            rows.append([name, *(_number(column.get(key)) for column in columns.values())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
             for row in rows]
    reference = result["reference"]
    return "\n".join([
        *lines,
        f"features {result['features']} ({result['weights_sha256'][:8]}), reference {reference['name']} "
        f"(role {reference['role'] or 'undeclared'}; {reference['statistics']}), "
        f"labels {result['labels'] or 'unknown'}, "
        f"{'' if result['comparable'] else 'not '}comparable with published scores",
    ])


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"
