"""``sample.py``: class-conditional images from a checkpoint, as files for scoring or as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mutor_img.common.cli import Parser
from mutor_img.common.errors import UserError, check_range
from mutor_img.common.images import check_png, write_png
from mutor_img.common.locks import file_lock
from mutor_img.common.outputs import keep_apart
from mutor_img.common.processes import check_shared
from mutor_img.decoding.sampler import Sampler
from mutor_img.sampling.archive import FORMAT, SampleArchive, open_archive
from mutor_img.sampling.editing import check_edit, edit
from mutor_img.sampling.labels import parse_classes
from mutor_img.sampling.options import add_sampling_flags, check_sampling_flags, open_source
from mutor_img.sampling.pictures import class_grid, decode_images, steps_strip
from mutor_img.sampling.source import SampleSource
from mutor_img.training.runtime import DEVICES, Runtime

GRID_CLASSES = 10  # rows of a grid whose classes are not given
GRID_COLUMNS = 8


def _parser() -> Parser:
    parser = Parser(
        description="Sample images from a trained generator: an npz in ADM's format or a folder of PNGs, a labelled "
                    "grid, or a strip that shows one image as it is generated. To continue a killed run, run the same "
                    "command again.",
        example="python sample.py --checkpoint runs/mnist/mutor2d --num-samples 1000 --out samples.npz\n"
                "python sample.py --checkpoint runs/imagenet256/mutor2d_b_80 --classes 207,360,387 --grid grid.png\n"
                "python sample.py --checkpoint runs/imagenet256/mutor2d_b_80 --classes otter --keep photo.png --mask "
                "mask.png --grid grid.png",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="run folder, checkpoint folder, hf://org/name or "
                                                             "LlamaGen .pt")
    add("--out", metavar="PATH", help="x.npz to write, with a JSON manifest beside it; or folder/ of PNGs, with "
                                      "labels.json and manifest.json")
    add("--grid", metavar="FILE", help="PNG to write: one row per class")
    add("--show-steps", metavar="FILE", help="PNG to write: the first image of --out as its codes arrive")
    add("--num-samples", type=int, help="number of images in --out (default: 50000); with --grid alone, number of "
                                        "images in the grid, rounded up to full rows (default: 8 per class)")
    add_sampling_flags(parser)
    add("--keep", metavar="IMAGE", help="image file whose codes are kept where --mask is black")
    add("--mask", metavar="IMAGE", help="image file of the same size: white where new codes are sampled")
    add("--mix-with", metavar="CLASS", help="mix the embedding of every class with that of this one")
    add("--mix-share", type=float, help="share of --mix-with in the mix, from 0 to 1 (default: 0.5)")
    add("--batch-size", type=int, default=64, help="images at a time on each device; changes memory use, not "
                                                         "results")
    add("--device", default="auto", metavar="NAME", help=DEVICES)
    return parser


def main(argv: Sequence[str]) -> Path:
    """The command; see ``--help``. Returns what ``--out`` names, or else a picture.

    Raises:
        UserError: a mistake in the flags or in the files they name.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    _check(args, _given(parser, argv))
    _keep_apart(args, {f"--{name}": getattr(args, name) for name in ("checkpoint", "tokenizer", "keep", "mask")})
    runtime = Runtime.on(args.device)
    outputs = file_lock(args.out, keeps=True), file_lock(args.grid), file_lock(args.show_steps)
    with runtime.one_voice(), runtime.claim(*outputs):
        return _write(args, runtime)


def _write(args: argparse.Namespace, runtime: Runtime) -> Path:
    """Write all that the flags ask for; returns what ``--out`` names, or else a picture."""
    source = _edited(args, open_source(args, runtime))
    _keep_apart(args, {"the tokenizer": source.tokenizer.path})
    count = 50_000 if args.num_samples is None else args.num_samples
    archive = open_archive(args.out, {"format": FORMAT, **source.identity(count)}) if args.out else None
    if archive:
        runtime.from_main(archive.is_finished)  # what is refused has drawn over no picture
    if args.grid and runtime.is_main:
        _write_grid(args, source)
    if args.show_steps and runtime.is_main:
        _write_strip(args.show_steps, source, int(source.labels(count)[0]))
    if archive is None:
        return Path(args.grid or args.show_steps)
    loaded = source.loaded
    about = {"checkpoint": str(loaded.path), "step": loaded.meta.get("step"), "tokenizer": source.tokenizer.path,
             "grid": list(loaded.model.config.grid), **source.draft.to_json(), "keep": args.keep, "mask": args.mask,
             "class_names": source.names, "versions": {name: version(name) for name in ("mutor_img", "torch", "numpy")}}
    write_samples(archive, source, about, runtime, args.batch_size)
    return archive.out


def _given(parser: Parser, argv: Sequence[str]) -> set[str]:
    """Return the names of the flags that stand on the command line."""
    absent = object()
    args = parser.parse_args(argv, argparse.Namespace(**{action.dest: absent for action in parser._actions}))
    return {name for name, value in vars(args).items() if value is not absent}


def _check(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse what cannot be meant before anything is read."""
    if not args.out and not args.grid and not args.show_steps:
        raise UserError("nothing to write; give --out samples.npz, --grid grid.png or --show-steps strip.png")
    for path in (args.grid, args.show_steps):
        check_png(path)
    if args.out:
        open_archive(args.out, {"num_samples": 0})
    elif not args.grid and {"num_samples", "batch_size"} & given:
        name = "--num-samples" if "num_samples" in given else "--batch-size"
        raise UserError(f"{name} does nothing for --show-steps, which makes one image; leave it out, or give --out")
    elif "labels" in given and not args.show_steps:
        raise UserError("--labels does nothing for --grid, whose rows are classes; leave it out, or give --out")
    if args.resize is not None and not args.out:
        raise UserError("--resize does nothing without --out: pictures show images as they are made; leave it out")
    check_sampling_flags(args)
    check_edit(args.keep, args.mask, args.mix_with, args.mix_share)
    check_range("--batch-size", args.batch_size, 1, 100_000)
    if args.num_samples is not None:
        check_range("--num-samples", args.num_samples, 1, 10**9)


def _edited(args: argparse.Namespace, source: SampleSource) -> SampleSource:
    """Return the source with what the flags of editing ask for."""
    label = None
    if args.mix_with is not None:
        label, *more = parse_classes(args.mix_with, source.names, source.run_names, "--mix-with")
        if more:
            raise UserError(f"--mix-with is {args.mix_with!r}; give one class")
    return edit(source, args.keep, args.mask, label, args.mix_share)


def _keep_apart(args: argparse.Namespace, inputs: dict[str, str | None]) -> None:
    """Refuse to write over, or into, what is read."""
    outputs, removed = {"--grid": args.grid, "--show-steps": args.show_steps}, {}
    if args.out:
        archive = open_archive(args.out, {"num_samples": 0})
        outputs["--out"], removed["--out"] = [archive.out, archive.manifest], archive.parts
    keep_apart(outputs, inputs, removed)


def _write_grid(args: argparse.Namespace, source: SampleSource) -> None:
    classes = source.classes
    if classes is None:  # evenly spread: neighbours in ImageNet look alike
        total = source.loaded.model.config.classes
        rows = min(GRID_CLASSES, total)
        classes = [row * total // rows for row in range(rows)]
    columns = GRID_COLUMNS
    if args.num_samples is not None and not args.out:
        columns = -(-args.num_samples // len(classes))
    write_png(args.grid, class_grid(source.loaded.model, source.tokenizer, classes, columns, source.names,
                                    source.settings, args.batch_size, draft=source.draft))
    print(f"{args.grid}: {len(classes)} classes, {columns} images each")


def _write_strip(path: str, source: SampleSource, label: int) -> None:
    write_png(path, steps_strip(source.loaded.model, source.tokenizer, label, source.names[label], source.settings,
                                source.draft))
    print(f"{path}: an image of {source.names[label]} as its codes arrive")


def write_samples(archive: SampleArchive, source: SampleSource, about: dict[str, Any], runtime: Runtime,
                  batch_size: int) -> None:
    """Make a sample set, going on from what an earlier run left, on all processes that call this alike.

    Args:
        archive: where to.
        source: what is sampled, on ``runtime.device``.
        about: what the manifest says beside ``archive.settings``.
        batch_size: images at a time on this device.

    Raises:
        UserError: the archive holds a run of other settings, or the processes have other ones.
    """
    runtime.agree(archive.settings)
    todo = runtime.from_main(archive.start)
    if todo is None:
        if runtime.is_main:
            print(f"{archive.out}: holds these {archive.count} samples already; nothing to do")
        return
    check_shared(archive.parts, "--out")
    labels, mine = source.labels(archive.count), todo[runtime.rank:: runtime.world]
    with tqdm(total=archive.count, initial=archive.done(), desc="sample", unit="image", mininterval=1.0,
              disable=not runtime.is_main) as bar:
        numbers = torch.tensor([i for unit in mine for i in archive.samples(unit)], dtype=torch.int64)
        images = _sample(source, labels, numbers, batch_size)
        ahead: list[np.ndarray] = []  # sampled, not yet a part
        for unit in mine:
            size = len(archive.samples(unit))
            while sum(map(len, ahead)) < size:
                ahead.append(next(images))
                if runtime.is_main:
                    bar.update(archive.done() + sum(map(len, ahead)) - bar.n)
            joined = np.concatenate(ahead)
            archive.write(unit, joined[:size])
            ahead = [joined[size:]]
        runtime.barrier()
        if runtime.is_main:
            bar.update(archive.done() - bar.n)
    if runtime.is_main:
        archive.merge(labels.numpy(), about)
        print(f"{archive.out}: {archive.count} images, described in {archive.manifest}")
    runtime.barrier()


def _sample(source: SampleSource, labels: Tensor, numbers: Tensor, batch_size: int) -> Iterator[np.ndarray]:
    """Yield (b, H, W, 3) uint8 images of the given sample numbers, a batch at a time; labels (count,) are of all."""
    model = source.loaded.model
    sampler = Sampler(model, source.settings, min(batch_size, len(numbers)), draft=source.draft)
    for part in numbers.split(batch_size):
        codes = sampler.generate(labels[part], part)
        yield decode_images(source.tokenizer, codes, model.config.grid, source.resize)
