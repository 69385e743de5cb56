"""``python -m tokenizer.reconstruct``: encode and decode images, and measure what was lost."""

from __future__ import annotations

if __name__ == "__main__":
    from mutor_img.common.threads import set_spinning

    set_spinning()  # before torch is loaded

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mutor_img.common.cli import Parser, parse_words, run
from mutor_img.common.errors import UserError, check_range
from mutor_img.common.files import filling, write_sealed
from mutor_img.common.images import check_png, to_nhwc, write_png
from mutor_img.common.locks import claim, file_lock
from mutor_img.common.outputs import keep_apart
from tokenizer.images.crops import center_rule, to_float
from tokenizer.images.layouts import open_unlabelled
from tokenizer.images.source import ImageSource, spread
from tokenizer.images.squares import Squares, readers
from tokenizer.loading import load_tokenizer
from tokenizer.network.interface import ImageTokenizer
from tokenizer.pictures import before_after
from tokenizer.scores import METRICS, ReconstructionScores

_PICTURES = 20


@readers()
def reconstruct_folder(vq: ImageTokenizer, images: str | Path, *, split: str | None = None, num_images: int = 0,
                       image_size: int | None = None, batch_size: int = 32, workers: int = 0,
                       picture: str | Path | None = None, samples: str | Path | None = None,
                       metrics: Sequence[str] | None = None,
                       inception_weights: str | None = None, lpips_weights: str | None = None) -> dict[str, Any]:
    """Reconstruct centre-cropped images and score them.

    Args:
        vq: the tokenizer.
        images: folder of images, flat or with a sub-folder for each class; or of Parquet or tar files, as
            tokenizer.encode takes them.
        split: the split to take, where names tell several.
        num_images: how many, spread evenly over the folder; 0: all.
        image_size: pixels per side; the tokenizer's own unless given.
        batch_size: images at a time.
        workers: reading processes; 0 reads in this one.
        picture: where to write a PNG of 20 images before and after, or None.
        samples: a new folder for the reconstructions, as :func:`write_classes` writes them, or None.
        metrics, inception_weights, lpips_weights: as in :class:`~tokenizer.scores.ReconstructionScores`.

    Returns:
        ``psnr`` in dB, ``ssim`` (pixels in [0, 1], data range 1), where their weights are at hand ``rfid`` and
        ``lpips``, ``sharpness`` (mean gradient, a ratio to the images'), ``codes_used`` (share of the vocabulary),
        ``perplexity`` of the codes, ``num_images``, what they were measured on, and ``not_computed`` with reasons.

    Raises:
        UserError: an unreadable image, an image size that does not fit, or weights that
            were asked for and are missing, or ``samples`` exists.
    """
    if samples and Path(samples).exists():
        raise UserError(f"{samples} exists; remove it, or give --samples another folder")
    image_size = vq.image_size if image_size is None else image_size
    if image_size is None:
        raise UserError("the tokenizer does not say its image size; give --image-size")
    vq.grid_for(image_size)
    device = vq.device
    folder = open_unlabelled(images, split=split)
    numbers = folder.spread(num_images)
    squares = Squares(folder, numbers, vq.image_channels, image_size, center_rule())
    shown = set(spread(len(numbers), _PICTURES).tolist())
    scores = ReconstructionScores(vq.vocabulary, len(numbers), image_size, metrics, device=device,
                                  inception_weights=inception_weights, lpips_weights=lpips_weights)
    kept, place = [], 0
    with (filling(samples) if samples else nullcontext() as aside,
          tqdm(total=len(numbers), desc="reconstruct", unit="image", mininterval=1.0) as bar):
        for batch, errors in squares.batches(batch_size, workers):  # (B, 1, C, H, W) uint8
            for error in filter(None, errors):
                raise UserError(error)
            pixels = to_float(batch[:, 0].to(device))
            codes = vq.encode(pixels)  # (B, N)
            before, after = to_nhwc(pixels), to_nhwc(vq.decode(codes))  # (B, H, W, 3) uint8
            scores.add(codes, before, after)
            if aside:
                write_classes(aside, folder, numbers[place : place + len(after)], after)
            kept += [(before[i], after[i]) for i in range(len(before)) if place + i in shown]
            place += len(before)
            bar.update(len(before))
        result = scores.result()
        if picture:  # before the samples have their name: what ends it here leaves nothing in the way of another try
            before, after = (np.stack(side) for side in zip(*kept))
            write_png(picture, before_after(before, after))
    return {**result, "num_images": len(numbers), "images": str(images), "image_size": image_size,
            "tokenizer": vq.path, "tokenizer_hash": vq.hash}


def write_classes(folder: Path, source: ImageSource, numbers: np.ndarray, images: np.ndarray) -> None:
    """Write images as PNGs, with a sub-folder per class where there are several: what ``evaluate_fid.py`` scores.

    Args:
        folder: where to.
        source: the images that they are reconstructions of.
        numbers: (B,) their numbers in the source.
        images: (B, H, W, 3) uint8.
    """
    for number, image in zip(numbers.tolist(), images):
        name = source.classes[source.labels[number]] if len(source.classes) > 1 else ""
        place = folder / name.replace("/", "_")
        place.mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{number:08d}.png")


def main(argv: Sequence[str]) -> None:
    """Parse, reconstruct and print."""
    options = _parser().parse_args(argv)
    check_range("--num-images", options.num_images, 0, 10**9)
    check_range("--batch-size", options.batch_size, 1, 65536)
    if options.image_size is not None:
        check_range("--image-size", options.image_size, 1, 65536)
    check_range("--workers", options.workers, 0, 256)
    check_png(options.out)
    keep_apart({"--out": options.out, "--samples": options.samples, "--json": options.json},
               {"--tokenizer": options.tokenizer, "--images": options.images,
                "--inception-weights": options.inception_weights, "--lpips-weights": options.lpips_weights})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with claim(file_lock(options.out), file_lock(options.samples, keeps=True), file_lock(options.json)):
        scores = reconstruct_folder(
            load_tokenizer(options.tokenizer, device), options.images, split=options.split,
            num_images=options.num_images, image_size=options.image_size, batch_size=options.batch_size,
            workers=options.workers, picture=options.out, samples=options.samples,
            metrics=parse_words(options.metrics, "--metrics") if options.metrics else None,
            inception_weights=options.inception_weights, lpips_weights=options.lpips_weights)
        for warning in scores.get("rfid_warnings", ()):
            print(f"warning: {warning}", file=sys.stderr)
        print(table(scores))
        if options.out:
            print(f"picture      {options.out}")
        if options.samples:
            print(f"samples      {options.samples}")
        if options.json:
            write_sealed(options.json, scores)


def _parser() -> Parser:
    parser = Parser(
        description="Encode and decode images: PSNR, SSIM, rFID, LPIPS, code usage, and a before/after picture.",
        example="python -m tokenizer.reconstruct --tokenizer runs/mnist/tokenizer --images data/mnist/val "
                "--out reconstructions.png",
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="tokenizer run folder, hf://org/name, or a released file")
    add("--images", required=True, help="folder of images, with or without class folders, or of Parquet or tar "
                                       "files, as for encode")
    add("--split", metavar="NAME", help="the split to use, if the folder holds several, as for encode")
    add("--num-images", type=int, default=0, help="number of images, spread evenly over the folder; 0: all")
    add("--image-size", type=int, help="pixels per side (default: the tokenizer's own)")
    add("--batch-size", type=int, default=32, help="images at a time; changes memory use, not results")
    add("--workers", type=int, default=2, help="processes that read images; 0: none")
    add("--metrics", metavar="LIST", help=f"some of {','.join(METRICS)}; default: psnr, ssim and those whose weights "
                                          "are on this machine")
    add("--inception-weights", metavar="FILE", help="file of rFID's Inception weights, if not in torch's hub folder")
    add("--lpips-weights", metavar="FOLDER", help="folder with vgg16-397923af.pth and vgg.pth, if they are not in "
                                                  "torch's hub folder and the package lpips")
    add("--out", metavar="PNG", help="picture to write: images before and after")
    add("--samples", metavar="FOLDER", help="new folder to write the reconstructions to, as PNGs, one sub-folder per "
                                            "class, for evaluate_fid.py --samples")
    add("--json", metavar="FILE", help="JSON file to write the scores to")
    return parser


def table(scores: dict[str, Any]) -> str:
    """Return the result of :func:`reconstruct_folder` as lines for a person."""
    lines = [f"images       {scores['num_images']}"]
    formats = {"psnr": ("PSNR", "{:.2f} dB"), "ssim": ("SSIM", "{:.4f}   (data range 1)"),
               "rfid": ("rFID", "{:.2f}   (against these images)"), "lpips": ("LPIPS", "{:.4f}"),
               "sharpness": ("sharpness", "{:.2f}   (mean gradient, a ratio to the images')")}
    lines += [f"{name:<12} {text.format(scores[key])}" for key, (name, text) in formats.items()
              if scores.get(key) is not None]
    lines += [f"codes used   {scores['codes_used']:.1%}", f"perplexity   {scores['perplexity']:.1f}"]
    lines += [f"not computed {name}: {reason}" for name, reason in scores["not_computed"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
