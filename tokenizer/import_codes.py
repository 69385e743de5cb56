"""``python -m tokenizer.import_codes``: codes that others have published into a code store, without images."""

from __future__ import annotations

if __name__ == "__main__":
    from mutor_img.common.threads import set_spinning

    set_spinning()  # before torch is loaded

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isqrt
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mutor_img.common.cli import Parser, run
from mutor_img.common.errors import UserError, check_choice
from mutor_img.common.locks import folder_lock
from mutor_img.common.outputs import keep_apart
from mutor_img.data.store import code_dtype
from mutor_img.training.runtime import Runtime
from tokenizer.code_sets import FORMATS, TEN, CodeSet
from tokenizer.images.crops import VIEWS, CropRule, center_rule, ten_crop_rule, view_names
from tokenizer.images.source import IMAGENET, read_class_list
from tokenizer.loading import load_tokenizer
from tokenizer.store import Recipe, StoreWriter, write_store

_READERS, _AT_ONCE = 8, 256  # threads that wait for small files, and images given to them at a time


def rule_of(codes: CodeSet, scale: float | None) -> CropRule:
    """Return the crop rule that made as many views of an image.

    Args:
        codes: two views are the centre crop and its mirror image, ten are LlamaGen's ten crops.
        scale: ``--crop-scale``, of ten crops only.

    Raises:
        UserError: another number of views, or a scale where there are no ten crops.
    """
    views = codes.shape[0]
    if views == TEN:
        return ten_crop_rule() if scale is None else ten_crop_rule(scale)
    if views != len(VIEWS):
        raise UserError(f"{codes.name(0)}: {views} views of an image; expected 2 (the centre crop and its mirror "
                        "image) or 10 (ten crops)")
    if scale is not None:
        raise UserError(f"--crop-scale is for ten crops, but {codes.name(0)} holds {views} views; leave it out")
    return center_rule()


def read_rows(codes: CodeSet, numbers: Sequence[int], vocabulary: int, *, quiet: bool,
              ) -> Iterator[tuple[np.ndarray, str]]:
    """Yield the (views, N) codes of one image after another, as :func:`~tokenizer.store.write_store` takes them.

    Raises:
        UserError: at the first image whose codes cannot be read or are out of range.
    """
    dtype = code_dtype(vocabulary)
    with (ThreadPoolExecutor(_READERS) as pool,
          tqdm(total=len(numbers), desc="import", unit="image", disable=quiet, mininterval=1.0) as bar):
        for first in range(0, len(numbers), _AT_ONCE):
            part = numbers[first : first + _AT_ONCE]
            for row in pool.map(lambda number: codes.read(number, vocabulary), part):
                yield row.astype(dtype), ""
                bar.update()


def build_parser() -> Parser:
    """Return the command's options."""
    parser = Parser(
        description="Bring published codes into a code store, without images. To resume, run the same command again.",
        example="python -m tokenizer.import_codes --format randar --source imagenet-llamagen-adm-256_codes "
                "--tokenizer vq_ds16_c2i.pt --classes imagenet-1k --out codes/imagenet256",
    )
    parser.add_argument("--format", required=True, help="randar (a folder per label), llamagen (folders *_codes and "
                        "*_labels) or maskgit-jsonl (1d-tokenizer's file of JSON lines)")
    parser.add_argument("--source", required=True, help="folder, or file of JSON lines, to read")
    parser.add_argument("--tokenizer", help="tokenizer that made the codes, which the files do not name")
    parser.add_argument("--classes", metavar="LIST", help=f"all classes in label order, which the files do not name: "
                        f"{IMAGENET}, a folder of class folders, or a file with one class per line")
    parser.add_argument("--out", required=True, help="folder of the code store to write")
    parser.add_argument("--crop-scale", type=float, help="ten crops: side of the square that they were cut from, in "
                        "image sizes (default: 1.1; LlamaGen also uses 1.05)")
    return parser


def main(argv: Sequence[str]) -> None:
    """Parse, and import."""
    options = build_parser().parse_args(argv)
    check_choice("--format", options.format, tuple(FORMATS))
    for flag, hint in (("tokenizer", "the tokenizer that made them"), ("classes", f"{IMAGENET}, for example")):
        if getattr(options, flag) is None:
            raise UserError(f"--{flag} is missing: published codes do not name their {flag}; give {hint}")
    out = Path(options.out)
    keep_apart({"--out": out},
               {"--tokenizer": options.tokenizer, "--source": options.source,
                "--classes": None if options.classes == IMAGENET else options.classes}, {"--out": out / "parts"})
    runtime = Runtime.on("auto")
    with runtime.one_voice(), runtime.claim(folder_lock(options.out, keeps=True)):
        _import(options, runtime)


def _import(options: Namespace, runtime: Runtime) -> None:
    """Load what the flags name, write the store, and say what came out."""
    vq = load_tokenizer(options.tokenizer)
    codes = FORMATS[options.format](Path(options.source), read_class_list(options.classes), runtime.is_main)
    rule, (views, length) = rule_of(codes, options.crop_scale), codes.shape
    side = isqrt(length)
    if side * side != length:
        raise UserError(f"{codes.name(0)}: {length} codes per view fill no square")
    if runtime.is_main:
        print(f"{options.source}: {len(codes)} images, {len(np.unique(codes.labels))} of {len(codes.classes)} classes")
        if codes.note:
            print(f"note: {codes.note}", file=sys.stderr)
    recipe = Recipe(vq.hash, view_names(tuple(VIEWS), rule), rule.name, side * vq.downsample)
    writer = StoreWriter(options.out, codes, recipe, f"import {options.format}")
    write_store(writer, lambda numbers: read_rows(codes, numbers, vq.vocabulary, quiet=not runtime.is_main), runtime,
                vq.path, (side, side), vq.vocabulary)
    if runtime.is_main:
        print(f"{options.out}: {len(codes)} images x {views} views x {length} codes; look at them: python -m "
              f"tokenizer.inspect --codes {options.out}")


if __name__ == "__main__":
    run(main)
