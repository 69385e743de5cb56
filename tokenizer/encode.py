"""``python -m tokenizer.encode``: a folder of images into a code store.

The work is cut into parts of fixed size whatever the number of processes, and on the CPU the network always runs on
one number of rows: the files are the same bytes for any number of processes and any batch size.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mutor_img.cli import Parser, run
from mutor_img.codes import Codes
from mutor_img.errors import UserError, check_range, suggest
from mutor_img.training.runtime import Runtime
from tokenizer.crops import CROPS, CropRule, crop_rule, read_squares, to_float
from tokenizer.folder import ImageFolder, list_images
from tokenizer.loading import load_tokenizer
from tokenizer.quantizer import USED_SLOTS
from tokenizer.store import Recipe, StoreWriter
from tokenizer.vq import VQModel

VIEWS = {"plain": lambda squares: squares, "mirror": lambda squares: squares.flip(-1)}


class Squares(Dataset):
    """The cropped images of some image numbers, read in worker processes; a reading error is data, not a crash."""

    def __init__(self, folder: ImageFolder, numbers: Sequence[int], channels: int, image_size: int, rule: CropRule):
        self.folder, self.numbers, self.channels = folder, numbers, channels
        self.image_size, self.rule = image_size, rule

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Return (squares, channels, size, size) uint8 and an empty string, or zeros and what was wrong."""
        try:
            path = self.folder.path(self.numbers[index])
            return read_squares(path, self.channels, self.image_size, self.rule), ""
        except UserError as error:
            shape = (len(self.rule.squares), self.channels, self.image_size, self.image_size)
            return torch.zeros(shape, dtype=torch.uint8), str(error)


def view_names(views: Sequence[str], rule: CropRule) -> tuple[str, ...]:
    """Return a name for each view of an image: every kind of view of every square that the crop rule cuts."""
    return tuple(f"{view}-{square}" if square else view for view in views for square in rule.squares)


def parse_views(text: str) -> list[str]:
    """Return the kinds of view in a comma-separated list.

    Raises:
        UserError: an unknown, repeated or missing name.
    """
    views = text.split(",")
    for view in views:
        if view not in VIEWS:
            raise UserError(f"view {view!r} is unknown{suggest(view, VIEWS)}")
    if len(set(views)) < len(views):
        raise UserError(f"--views {text} names a view twice")
    return views


def encode_folder(vq: VQModel, images: str | Path, out: str | Path, *, runtime: Runtime, views: Sequence[str],
                  crop: str = "center", image_size: int | None = None, batch_size: int = 64, workers: int = 0,
                  max_unreadable: int = 0) -> Codes:
    """Encode an image folder into a code store at ``out``, going on from what an earlier run left there.

    Args:
        vq: the tokenizer, on ``runtime.device``.
        images: folder with one sub-folder of images a class.
        out: the code store's folder.
        runtime: this process among all that call this with the same arguments.
        views: kinds of view, of ``VIEWS``.
        crop: name of the crop rule.
        image_size: pixels a side; the tokenizer's own unless given.
        batch_size: images read and sent to the device at a time.
        workers: reading processes; 0 reads in this one.
        max_unreadable: images that may be left out because they cannot be read.

    Raises:
        UserError: images, tokenizer and an existing ``out`` that do not fit, or too many unreadable images.
    """
    if vq.vocabulary > USED_SLOTS:
        raise UserError(f"the tokenizer has {vq.vocabulary} codes; codes are stored as uint16, {USED_SLOTS} at most")
    image_size = image_size or vq.image_size
    if image_size is None:
        raise UserError("the tokenizer does not say its image size; give --image-size")
    grid, rule = vq.grid_for(image_size), crop_rule(crop)
    folder = list_images(images)
    writer = StoreWriter(out, folder, Recipe(vq.hash, view_names(views, rule), crop, image_size))
    if writer.finished():
        if runtime.is_main:
            print(f"{out}: these {len(folder)} images are encoded already; nothing to do")
        return Codes(out)
    todo = [part for part in range(writer.count()) if not writer.is_done(part)]
    runtime.barrier()  # every process has listed the same parts before the first one is written
    mine = todo[runtime.rank:: runtime.world]
    numbers = [i for part in mine for i in writer.range(part)]
    loader = DataLoader(Squares(folder, numbers, vq.image_channels, image_size, rule), batch_size,
                        num_workers=workers, pin_memory=runtime.device.type == "cuda")
    rows = _encode(vq, loader, runtime, views, len(numbers))
    for part in mine:
        _write_part(writer, part, rows)
    runtime.barrier()
    _report_unreadable(writer, max_unreadable, runtime)
    if runtime.is_main:
        writer.merge(vq.path, grid, vq.vocabulary)
    runtime.barrier()
    return Codes(out)


def _encode(vq: VQModel, loader: DataLoader, runtime: Runtime, views: Sequence[str],
            total: int) -> Iterator[tuple[np.ndarray, str]]:
    """Yield the (views, N) uint16 codes of one image after another, with its reading error or an empty string."""
    with tqdm(total=total, desc="encode", unit="image", disable=not runtime.is_main, mininterval=1.0) as bar:
        for squares, errors in loader:  # (B, squares, C, H, W) uint8
            pixels = to_float(squares.to(runtime.device, non_blocking=True))
            seen = torch.cat([VIEWS[view](pixels) for view in views], dim=1)  # (B, views, C, H, W)
            codes = vq.encode(seen.flatten(0, 1)).view(*seen.shape[:2], -1)  # (B, views, N)
            yield from zip(codes.cpu().numpy().astype(np.uint16), errors)
            bar.update(len(squares))


def _write_part(writer: StoreWriter, part: int, rows: Iterator[tuple[np.ndarray, str]]) -> None:
    codes, unreadable = [], {}
    for number in writer.range(part):
        row, error = next(rows)
        if error:
            unreadable[writer.folder.files[number]] = error
        else:
            codes.append(row)
    writer.write(part, np.stack(codes) if codes else row[None][:0], unreadable)


def _report_unreadable(writer: StoreWriter, limit: int, runtime: Runtime) -> None:
    """List every unreadable image on stderr and in ``unreadable.txt``.

    Raises:
        UserError: there are more than ``limit``.
    """
    found = writer.unreadable()
    if not found:
        return
    if runtime.is_main:
        (writer.out / "unreadable.txt").write_text("".join(f"{name}\n" for name in found))
        print("\n".join(found.values()), file=sys.stderr)
    if len(found) > limit:
        raise UserError(f"{len(found)} of {len(writer.folder)} images in {writer.folder.root} cannot be read (listed "
                        f"above and in {writer.out / 'unreadable.txt'}; first: {next(iter(found))}); mend them and run "
                        f"the same command again, or leave them out with --max-unreadable {len(found)}")


def main(argv: Sequence[str]) -> None:
    """Parse, load and encode."""
    parser = Parser(
        description="Encode a folder of images (one sub-folder a class) into a code store. To resume, run the same "
                    "command again.",
        example="torchrun --nproc-per-node 8 -m tokenizer.encode --tokenizer vq_ds16_c2i.pt --images imagenet/train "
                "--out codes/imagenet256",
        prog="python -m tokenizer.encode",
    )
    parser.add_argument("--tokenizer", required=True, help="tokenizer run folder, or released LlamaGen .pt")
    parser.add_argument("--images", required=True, help="folder with one sub-folder of images a class")
    parser.add_argument("--out", required=True, help="folder of the code store to write")
    parser.add_argument("--views", default="plain,mirror", help="views of each image: plain, or plain,mirror")
    parser.add_argument("--crop", default="center", help=f"crop rule: {', '.join(CROPS)}")
    parser.add_argument("--image-size", type=int, help="pixels a side (the tokenizer's own unless given)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time on each device")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1),
                        help="reading processes for each device; 0: none")
    parser.add_argument("--max-unreadable", type=int, default=0, help="unreadable images that may be left out")
    options = parser.parse_args(argv)
    check_range("--batch-size", options.batch_size, 1, 65536)
    check_range("--workers", options.workers, 0, 256)
    check_range("--max-unreadable", options.max_unreadable, 0, 10**9)
    if options.image_size is not None:
        check_range("--image-size", options.image_size, 1, 65536)
    views = parse_views(options.views)
    crop_rule(options.crop)
    runtime = Runtime.start()
    codes = encode_folder(
        load_tokenizer(options.tokenizer, runtime.device), options.images, options.out, runtime=runtime, views=views,
        crop=options.crop, image_size=options.image_size, batch_size=options.batch_size, workers=options.workers,
        max_unreadable=options.max_unreadable)
    if runtime.is_main:
        images, count, length = codes.codes.shape
        print(f"{options.out}: {images} images, {count} views, {length} codes each")


if __name__ == "__main__":
    run(main)
