"""``python -m tokenizer.encode``: labelled images into a code store.

The work is cut into parts of fixed size whatever the number of processes, and on the CPU the network always runs on
one number of rows: the files are the same bytes for any number of processes and any batch size.
"""

from __future__ import annotations

if __name__ == "__main__":
    from mutor_img.common.threads import set_spinning

    set_spinning()  # before torch is loaded

import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mutor_img.common.cli import Parser, parse_words, run
from mutor_img.common.errors import UserError, check_choice, check_range
from mutor_img.common.locks import folder_lock
from mutor_img.common.outputs import keep_apart
from mutor_img.data.store import Codes, code_dtype
from mutor_img.training.runtime import Runtime
from tokenizer.images.crops import CROPS, VIEWS, CropRule, center_rule, to_float, view_names
from tokenizer.images.layouts import open_images
from tokenizer.images.source import IMAGENET, ImageSource
from tokenizer.images.squares import Squares, readers
from tokenizer.loading import load_tokenizer
from tokenizer.network.interface import ImageTokenizer, rows_at_once
from tokenizer.store import Recipe, StoreWriter, write_store


def parse_views(text: str | None, rule: CropRule) -> list[str]:
    """Return the kinds of view in a comma-separated list; all that there are where it is None.

    Raises:
        UserError: an unknown, repeated or missing name, or a rule that mirrors by itself.
    """
    if rule.mirrored:
        if text is not None:
            raise UserError(f"--views {text}: crop rule {rule.name!r} makes its own views; leave --views out")
        return ["plain"]
    views = list(VIEWS) if text is None else parse_words(text, "--views")
    for view in views:
        check_choice("a view", view, VIEWS)
    if len(set(views)) < len(views):
        raise UserError(f"--views {text} names a view twice")
    return views


@readers()
def encode_images(vq: ImageTokenizer, source: ImageSource, out: str | Path, *, runtime: Runtime,
                  rule: CropRule | None = None, views: Sequence[str] = tuple(VIEWS), image_size: int | None = None,
                  batch_size: int = 64, workers: int = 0, max_unreadable: int = 0) -> Codes:
    """Encode images into a code store at ``out``, going on from what an earlier run left there.

    Args:
        vq: the tokenizer, on ``runtime.device``.
        source: the images.
        out: the code store's folder.
        runtime: this process among all that call this with the same arguments.
        rule: crop rule; the centre crop unless given.
        views: kinds of view, of ``VIEWS``; a rule whose squares are mirrored already takes ``("plain",)``.
        image_size: pixels per side; the tokenizer's own unless given.
        batch_size: images read and sent to the device at a time.
        workers: reading processes; 0 reads in this one.
        max_unreadable: images that may be left out because they cannot be read.

    Raises:
        UserError: images, tokenizer and an existing ``out`` that do not fit, too many unreadable images, or processes
            that see other images or another tokenizer.
    """
    image_size = image_size or vq.image_size
    if image_size is None:
        raise UserError("the tokenizer does not say its image size; give --image-size")
    grid, rule = vq.grid_for(image_size), rule or center_rule()
    writer = StoreWriter(out, source, Recipe(vq.hash, view_names(views, rule), rule.name, image_size))

    def rows(numbers: Sequence[int]) -> Iterator[tuple[np.ndarray, str]]:
        batches = Squares(source, numbers, vq.image_channels, image_size, rule).batches(batch_size, workers)
        return _encode(vq, batches, runtime, views, len(numbers))

    return write_store(writer, rows, runtime, vq.path, grid, vq.vocabulary, max_unreadable)


def _encode(vq: ImageTokenizer, batches: Iterable[tuple[Tensor, Sequence[str]]], runtime: Runtime, views: Sequence[str],
            total: int) -> Iterator[tuple[np.ndarray, str]]:
    """Yield the (views, N) codes of one image after another, with its reading error or an empty string."""
    with tqdm(total=total, desc="encode", unit="image", disable=not runtime.is_main, mininterval=1.0) as bar:
        for squares, errors in batches:  # (B, squares, C, H, W) uint8
            pixels = squares.to(runtime.device)
            seen = torch.cat([VIEWS[view](pixels) for view in views], dim=1)  # (B, views, C, H, W) uint8
            # Whole as bytes and a pass at a time as fp32: a batch may have a thousand views of each image.
            passes = seen.flatten(0, 1).split(rows_at_once(seen.device, *seen.shape[-2:]))
            codes = torch.cat([vq.encode(to_float(part)) for part in passes]).view(*seen.shape[:2], -1)  # (B, views, N)
            bar.update(len(squares))  # whoever takes the last row does not come back
            yield from zip(codes.cpu().numpy().astype(code_dtype(vq.vocabulary)), errors)


def build_parser() -> Parser:
    """Return the command's options."""
    parser = Parser(
        description="Encode labelled images into a code store. To resume, run the same command again.",
        example="torchrun --nproc-per-node 8 -m tokenizer.encode --tokenizer vq_ds16_c2i.pt --images imagenet/train "
                "--out codes/imagenet256",
    )
    parser.add_argument("--tokenizer", required=True, help="tokenizer run folder, hf://org/name, or a released file "
                        "(LlamaGen's .pt; docs/tokenizer.md lists others)")
    parser.add_argument("--images", required=True, help="folder with one sub-folder of images per class, or with "
                        "Parquet files (data/train is the split train), or with WebDataset's tar files, or, with "
                        "--labels, with images alone")
    parser.add_argument("--out", required=True, help="folder of the code store to write")
    parser.add_argument("--labels", metavar="FILE", help="labels of images that are in one folder: one name and class "
                        "per line (LOC_val_solution.csv), or one class per line in the order of the file names")
    parser.add_argument("--split", metavar="NAME", help="the split to encode, if the folder holds several: train takes "
                        "imagenet-train-0000.tar and leaves out imagenet-val-0000.tar")
    parser.add_argument("--classes", metavar="LIST", help=f"all classes in label order: {IMAGENET}, a folder of class "
                        "folders, or a file with one class per line (default: the classes found, sorted)")
    parser.add_argument("--crop", default="center", help=f"crop rule: {', '.join(CROPS)}")
    parser.add_argument("--views", help="views of each image with --crop center: plain or plain,mirror (default: both)")
    parser.add_argument("--crop-scale", type=float, help="ten-crop: side of the square that the ten crops are cut "
                        "from, in image sizes (default: 1.1; LlamaGen also uses 1.05)")
    parser.add_argument("--crop-min", type=float, help="random: smallest crop, as a share of the shorter side "
                        "(default: 0.8)")
    parser.add_argument("--num-views", type=int, help="random: views per image (default: 10)")
    parser.add_argument("--seed", type=int, help="random: seed of the crops (default: 0)")
    parser.add_argument("--image-size", type=int, help="pixels per side (default: the tokenizer's own)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time on each device")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1),
                        help="processes per device that read images; 0: none")
    parser.add_argument("--max-unreadable", type=int, default=0, help="how many unreadable images may be left out")
    return parser


def rule_of(options: Namespace) -> CropRule:
    """Return the crop rule that the flags ask for.

    Raises:
        UserError: a rule or a number out of range, or a flag of another rule.
    """
    flags = {"scale": "crop_scale", "least": "crop_min", "count": "num_views", "seed": "seed"}
    given = {name: getattr(options, flag) for name, flag in flags.items() if getattr(options, flag) is not None}
    check_choice("--crop", options.crop, CROPS)
    make = CROPS[options.crop]
    for name in given:
        if name not in signature(make).parameters:
            raise UserError(f"--{flags[name].replace('_', '-')} does not belong to --crop {options.crop}; leave it out")
    return make(**given)


def main(argv: Sequence[str]) -> None:
    """Parse, load and encode."""
    options = build_parser().parse_args(argv)
    check_range("--batch-size", options.batch_size, 1, 65536)
    check_range("--workers", options.workers, 0, 256)
    check_range("--max-unreadable", options.max_unreadable, 0, 10**9)
    if options.image_size is not None:
        check_range("--image-size", options.image_size, 1, 65536)
    rule = rule_of(options)
    views = parse_views(options.views, rule)
    out = Path(options.out)
    keep_apart({"--out": [out, out / "unreadable.txt"]},
               {"--tokenizer": options.tokenizer, "--images": options.images, "--labels": options.labels,
                "--classes": None if options.classes == IMAGENET else options.classes}, {"--out": out / "parts"})
    runtime = Runtime.on("auto")
    with runtime.one_voice(), runtime.claim(folder_lock(options.out, keeps=True)):
        _encode_folder(options, rule, views, runtime)


def _encode_folder(options: Namespace, rule: CropRule, views: Sequence[str], runtime: Runtime) -> None:
    """Load what the flags name, encode, and say what came out."""
    vq = load_tokenizer(options.tokenizer, runtime.device)
    source = open_images(options.images, labels=options.labels, classes=options.classes, split=options.split,
                         progress=runtime.is_main)
    if runtime.is_main:
        names = source.class_names()
        print(f"{options.images}: {len(source)} images in {len(names)} classes: "
              f"{', '.join(names[:5])}{f', … {names[-1]}' if len(names) > 5 else ''}")
        for note in source.notes():
            print(f"note: {note}", file=sys.stderr)
    codes = encode_images(vq, source, options.out, runtime=runtime, rule=rule, views=views,
                          image_size=options.image_size, batch_size=options.batch_size, workers=options.workers,
                          max_unreadable=options.max_unreadable)
    if runtime.is_main:
        images, count, length = codes.codes.shape
        print(f"{options.out}: {images} images x {count} views x {length} codes")


if __name__ == "__main__":
    run(main)
