"""``python -m tokenizer.inspect``: look at a code store, so that a person sees that codes and labels are right."""

from __future__ import annotations

if __name__ == "__main__":
    from mutor_img.common.threads import set_spinning

    set_spinning()  # before torch is loaded

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mutor_img.common.cli import Parser, run
from mutor_img.common.errors import UserError, check_range
from mutor_img.common.files import from_above
from mutor_img.common.images import check_png, grid_picture, to_nhwc, write_png
from mutor_img.common.locks import claim, file_lock
from mutor_img.common.outputs import keep_apart
from mutor_img.data.store import Codes
from tokenizer.images.source import spread
from tokenizer.loading import load_tokenizer
from tokenizer.measures import CodeUse
from tokenizer.network.interface import ImageTokenizer

_COLUMNS = 10


def check_tokenizer(codes: Codes, vq: ImageTokenizer) -> None:
    """Raise :class:`UserError` unless ``vq`` is the very tokenizer that made ``codes``."""
    info = codes.info
    if vq.hash != info.tokenizer_hash:
        raise UserError(f"{vq.path} is tokenizer {vq.hash[:16]}, but {codes.folder} was made by "
                        f"{info.tokenizer_hash[:16]} ({info.tokenizer}); give that one with --tokenizer")


def decoded_grid(codes: Codes, vq: ImageTokenizer, count: int) -> Image.Image:
    """Return ``count`` images spread evenly over the store, first view, decoded, with class names below."""
    rows, labels = _some(codes, count)
    images = to_nhwc(vq.decode(rows, codes.info.grid))
    captions = [codes.info.class_names[label] for label in labels]
    return grid_picture(images, min(_COLUMNS, len(images)), captions=captions)


def _some(codes: Codes, count: int) -> tuple[Tensor, Tensor]:
    """Return codes (n, N) and labels (n,) of up to ``count`` images spread evenly over the store, first view.

    Raises:
        UserError: there are none, or one of them is damaged as far as their range tells; checksums are not compared.
    """
    numbers = spread(len(codes), count)
    if not len(numbers):
        raise UserError(f"{codes.folder}: holds no images")
    rows, labels = codes.batch(numbers, np.zeros_like(numbers))
    for what, found, bound in (("code", rows, codes.info.vocabulary), ("label", labels, len(codes.info.class_names))):
        if wrong := found[(found < 0) | (found >= bound)].tolist():
            raise UserError(f"{codes.folder}: is damaged: it holds the {what} {wrong[0]}, but {what}s go up to "
                            f"{bound - 1}; --verify names the block")
    return rows, labels


def main(argv: Sequence[str]) -> None:
    """Parse, and show what the flags ask for."""
    parser = Parser(
        description="Show what a code store holds: print its facts, and draw a grid of decoded codes with class names.",
        example="python -m tokenizer.inspect --codes codes/imagenet256 --out grid.png --verify",
    )
    parser.add_argument("--codes", required=True, help="code store made by tokenizer.encode")
    parser.add_argument("--tokenizer", help="tokenizer that made the codes (default: the one that the store names)")
    parser.add_argument("--out", metavar="PNG", default="codes.png", help="picture to write")
    parser.add_argument("--num", type=int, default=100, help="images in the picture, spread evenly over the store")
    parser.add_argument("--verify", action="store_true", help="read every block and compare its checksum")
    options = parser.parse_args(argv)
    check_range("--num", options.num, 1, 10_000)
    check_png(options.out)
    with claim(file_lock(options.out)):
        _show(options)


def _show(options: Namespace) -> None:
    """Describe, verify where asked, and draw."""
    codes = Codes(options.codes)
    info = codes.info
    tokenizer = options.tokenizer or from_above(info.tokenizer, options.codes)
    keep_apart({"--out": options.out}, {"--codes": options.codes, "the tokenizer": tokenizer})
    names = ", ".join(info.class_names[:5]) + (", …" if len(info.class_names) > 5 else "")
    print(f"images       {len(codes)} in {len(info.class_names)} classes ({names})")
    print(f"views        {', '.join(info.views)}, crop {info.crop}, {info.image_size} pixels")
    print(f"codes        {info.grid[0]} x {info.grid[1]} of a vocabulary of {info.vocabulary}")
    print(f"tokenizer    {info.tokenizer} ({info.tokenizer_hash[:16]})")
    if options.verify:
        codes.verify()
        print(f"verified     every checksum, code and label is right (blocks: {len(info.checksums)})")
    vq = load_tokenizer(tokenizer, "cuda" if torch.cuda.is_available() else "cpu")
    check_tokenizer(codes, vq)
    rows, _ = _some(codes, 10_000)
    use = CodeUse(info.vocabulary)
    use.add(rows)
    scores = use.scores()
    print(f"codes used   {scores['codes_used']:.1%}, perplexity {scores['perplexity']:.1f} "
          f"(over {len(rows)} images)")
    print(f"picture      {write_png(options.out, decoded_grid(codes, vq, options.num))}")


if __name__ == "__main__":
    run(main)
