"""``python -m mutor_img.sweep``: which guidance scale and schedule, and which temperature?"""

from __future__ import annotations

if __name__ == "__main__":
    from mutor_img.common.threads import set_spinning

    set_spinning()  # before torch is loaded

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mutor_img.checkpoints.folder import newest_of
from mutor_img.common.cli import Parser, parse_numbers, parse_words, run
from mutor_img.common.errors import UserError
from mutor_img.common.files import read_record, write_sealed
from mutor_img.common.hub import is_hub_name
from mutor_img.common.locks import folder_lock
from mutor_img.common.outputs import keep_apart
from mutor_img.decoding.guidance import parse_schedule
from mutor_img.evaluation.networks import (
    add_network_flags,
    check_network_flags,
    load_network,
    network_files,
    parse_metrics,
)
from mutor_img.metrics.evaluator import check_sets
from mutor_img.metrics.features import FeatureNetwork
from mutor_img.metrics.references import open_reference
from mutor_img.metrics.requirements import METRICS, OPTIONAL, frechet_key
from mutor_img.sampling.options import add_sampling_flags, check_sampling_flags, open_source
from mutor_img.sampling.source import GeneratedImages
from mutor_img.sweep.points import SweepPoint, best_point, grid, sweep
from mutor_img.sweep.report import advice, draw, schedule_note, table
from mutor_img.training.runtime import Runtime

SEED = 1  # not that of sample.py and evaluate_fid.py: a choice must not be made on the samples that are reported
_REPEATED = ("checkpoint", "tokenizer", "grid_size", "resize", "weights", "classes", "labels", "top_k", "top_p",
             "dtype", "draft", "draft_source", "reference", "features", "features_weights", "inception_weights")


def _parser() -> Parser:
    parser = Parser(
        description="Score a checkpoint at several guidance scales, schedules and temperatures, with few samples per "
                    "point. To continue a killed sweep, run the same command again. Further values are added to the "
                    "finished ones.",
        example="torchrun --nproc-per-node 8 -m mutor_img.sweep --checkpoint runs/imagenet256/mutor2d_b_80 "
                "--cfg-scales 1.5,1.75,2,2.25 --reference VIRTUAL_imagenet256_labeled.npz --num-samples 5000")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="run folder, checkpoint folder, hf://org/name or "
                                                             "LlamaGen .pt")
    add("--reference", required=True, metavar="PATH", help="what evaluate_fid.py --reference takes")
    add("--cfg-scales", default="1,1.5,2,2.5,3", metavar="LIST", help="guidance scales, comma-separated")
    add("--temperatures", default="1", metavar="LIST", help="temperatures, comma-separated")
    add("--cfg-schedules", metavar="LIST", help="guidance schedules to compare, as in constant,linear,power-cosine:2; "
                                                "default: that of --cfg-schedule")
    add("--num-samples", type=int, default=2000, help="samples per point")
    add("--metrics", metavar="LIST", help=f"fid, and any others of {','.join((*METRICS, *OPTIONAL))}; default: all of "
                                          f"{','.join(METRICS)} that the reference allows")
    add("--out", metavar="FOLDER", help="folder for sweep.json and sweep.png (default: sweep in the run folder)")
    add_network_flags(parser)
    add_sampling_flags(parser, without=("--cfg-scale", "--temperature"))
    parser.set_defaults(seed=SEED)
    return parser


def main(argv: Sequence[str]) -> dict[str, Any]:
    """The command; see ``--help``. Returns what ``sweep.json`` holds (empty on ranks other than 0).

    Raises:
        UserError: a mistake in the flags or in the files they name.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    check_network_flags(args)
    check_sampling_flags(args)
    points = grid(parse_numbers(args.cfg_scales, "--cfg-scales", float),
                  parse_numbers(args.temperatures, "--temperatures", float), _schedules(parser, args))
    metrics = parse_metrics(args.metrics)
    out = Path(args.out) if args.out else _default_folder(args.checkpoint)
    keep_apart(_outputs(out), {"--checkpoint": args.checkpoint, "--tokenizer": args.tokenizer,
                               "--reference": args.reference, **network_files(args)})
    runtime = Runtime.on(args.device)
    with runtime.one_voice(), runtime.claim(folder_lock(out)):
        network = _score(args, points, metrics, out, runtime)
        return _conclude(parser, args, network, out) if runtime.is_main else {}


def _outputs(out: Path) -> dict[str, list[Path]]:
    return {"--out": [out / "sweep.json", out / "sweep.png"]}


def _score(args: argparse.Namespace, points: list[SweepPoint], metrics: list[str] | None, out: Path,
           runtime: Runtime) -> FeatureNetwork:
    """Write the rows of all points, said as they come; returns the feature network."""
    # What is advised at the end is of these weights, also where the run has trained on.
    args.checkpoint = runtime.from_main(lambda: newest_of(args.checkpoint, args.fallback))
    args.cfg_scale, args.temperature, args.cfg_schedule, args.cfg_parameter = points[0]
    source, reference = open_source(args, runtime), open_reference(args.reference)
    keep_apart(_outputs(out), {"the tokenizer": source.tokenizer.path})
    check_sets(GeneratedImages(source, args.num_samples, args.batch_size), reference)
    network = load_network(args, runtime)  # last: it may have to be downloaded
    key = frechet_key(network)
    for number, row in enumerate(sweep(source, points, args.num_samples, reference, network, out=out / "sweep.json",
                                       metrics=metrics, batch_size=args.batch_size, progress=True)):
        if runtime.is_main:
            print(f"point {number + 1} of {len(points)}: cfg-scale {row['cfg_scale']:g}, temperature "
                  f"{row['temperature']:g}{schedule_note(row)}: {key} {row[key]:.4f} ({row['seconds']:.0f} s)",
                  flush=True)
    return network


def _conclude(parser: argparse.ArgumentParser, args: argparse.Namespace, network: FeatureNetwork,
              out: Path) -> dict[str, Any]:
    """Write and print what all rows say, those of earlier commands too; returns what ``sweep.json`` holds."""
    found = read_record(out / "sweep.json")
    rows = sorted(found["points"], key=lambda row: (schedule_note(row), row["temperature"], row["cfg_scale"]))
    key, best = frechet_key(network), best_point(rows, network)
    command = full_command(parser, args, best)
    result = {**found, "best": best, "command": command}
    write_sealed(out / "sweep.json", result)
    print("\n".join([table(rows, best), *advice(rows, best, key), "the score of 50000 samples there:", f"  {command}",
                     f"{out / 'sweep.json'}, {draw(rows, best, key, out / 'sweep.png')}"]))
    return result


def full_command(parser: argparse.ArgumentParser, args: argparse.Namespace, best: dict[str, Any]) -> str:
    """Return the command that scores 50 000 other samples at the best point."""
    words = ["python", "evaluate_fid.py"]
    for name in _REPEATED:
        value = getattr(args, name)
        if value != parser.get_default(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name in ("cfg_schedule", "cfg_parameter"):
        if best[name] != parser.get_default(name):
            words += [f"--{name.replace('_', '-')}", str(best[name])]
    words += ["--cfg-scale", str(best["cfg_scale"]), "--temperature", str(best["temperature"]),
              "--seed", str(0 if args.seed else SEED), "--num-samples", "50000", "--json", "scores.json"]
    return shlex.join(words)


def _default_folder(given: str) -> Path:
    """Return ``sweep`` in a run folder, else a folder beside the checkpoint; of a name on the Hub, in this folder."""
    checkpoint = Path(given)
    if is_hub_name(given):
        return Path(f"sweep_{checkpoint.name}")
    if (checkpoint / "checkpoints").is_dir():
        return checkpoint / "sweep"
    return checkpoint.resolve().with_name(f"sweep_{checkpoint.resolve().stem}")


def _schedules(parser: Parser, args: argparse.Namespace) -> list[tuple[str, float | None]]:
    """Return name and parameter of each guidance schedule, all different."""
    if args.cfg_schedules is None:
        return [(args.cfg_schedule, args.cfg_parameter)]
    parser.refuse(args, ("cfg_schedule", "cfg_parameter"), "and --cfg-schedules exclude each other; name all schedules "
                                                           "in the latter, as in linear,power-cosine:2")
    schedules = [parse_schedule(word) for word in parse_words(args.cfg_schedules, "--cfg-schedules")]
    if len(set(schedules)) < len(schedules):
        raise UserError(f"--cfg-schedules {args.cfg_schedules!r}: a schedule is given twice")
    return schedules


if __name__ == "__main__":
    run(main)
