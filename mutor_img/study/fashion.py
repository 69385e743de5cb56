"""Fashion-MNIST's 60 000 + 10 000 images as an ImageFolder of PNGs, from the four files that it is published in.

    python -m mutor_img.study.fashion --raw data/FashionMNIST/raw --out data/fashion
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mutor_img.common.cli import Parser, run
from mutor_img.common.errors import UserError
from mutor_img.common.outputs import keep_apart
from mutor_img.study.image_folder import prepare_folder, save_padded

PARTS = {"train": "train", "val": "t10k"}  # the folder's split, and how the names of its two files begin
SIDE, CLASSES = 28, 10
_UINT8 = 8  # IDX's number for bytes
_MOST = 2**20  # images of a file


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the array of a file in IDX format (LeCun et al., MNIST), gzipped or not.

    Args:
        path: the file.
        dimensions: that the array must have.

    Returns:
        Any shape, uint8.

    Raises:
        UserError: it is no such file, or is cut off.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            head = file.read(4 + 4 * dimensions)
            if head[:4] != bytes([0, 0, _UINT8, dimensions]) or len(head) != 4 + 4 * dimensions:
                raise UserError(f"{path}: not an IDX file of bytes in {dimensions} dimension{'s' * (dimensions > 1)}; "
                                "give the folder of Fashion-MNIST's four files")
            shape = struct.unpack(f">{dimensions}I", head[4:])
            count = math.prod(shape)
            if shape[0] > _MOST or any(size != SIDE for size in shape[1:]):
                raise UserError(f"{path}: its array is {' x '.join(map(str, shape))}, not {SIDE} x {SIDE} images of "
                                "Fashion-MNIST or their labels")
            data = file.read(count + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged ({error}); fetch it again") from None
    if len(data) != count:
        raise UserError(f"{path}: holds {'more' if len(data) > count else 'fewer'} than the {count} bytes that it "
                        "says; fetch it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_part(raw: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (n, 28, 28) and labels (n,) of a split, uint8 both.

    Raises:
        UserError: a file is missing or damaged, or the two do not belong together.
    """
    images, labels = (read_idx(_find(raw, f"{PARTS[part]}-{name}"), dimensions)
                      for name, dimensions in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1)))
    if len(images) != len(labels):
        raise UserError(f"{raw}: {len(images)} images and {len(labels)} labels in {PARTS[part]}-*; fetch both again")
    if len(labels) and labels.max() >= CLASSES:
        raise UserError(f"{raw}: {PARTS[part]}-labels-idx1-ubyte has a label {labels.max()}, and there are {CLASSES} "
                        "classes")
    return images, labels


def _find(raw: Path, name: str) -> Path:
    for path in (raw / name, raw / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"--raw {raw}: neither {name} nor {name}.gz is there; give the folder of Fashion-MNIST's four "
                    "files")


def prepare_fashion(raw: str | Path, folder: str | Path) -> bool:
    """Write ``folder/{train,val}/{0..9}/*.png``, unless it is there; returns whether anything was written.

    Images are padded from 28 to 32 pixels with background. All four files are read before anything is written.

    Raises:
        UserError: a file is missing or damaged, or another process is writing there.
    """
    def write(aside: Path) -> None:
        arrays = {part: read_part(Path(raw), part) for part in PARTS}
        with tqdm(total=sum(len(labels) for _, labels in arrays.values()), unit="image", mininterval=1.0) as bar:
            for part, (images, labels) in arrays.items():
                for number, (image, label) in enumerate(zip(images, labels.tolist())):
                    save_padded(aside / part / str(label) / f"{number:05d}.png", image)
                    bar.update()

    return prepare_folder(folder, write)


def main(argv: Sequence[str]) -> None:
    """The command; see ``--help``.

    Raises:
        UserError: a mistake in the flags or in the files they name.
    """
    parser = Parser(description="Write Fashion-MNIST's images as folders of PNGs, padded to 32 x 32 pixels.",
                    example="python -m mutor_img.study.fashion --raw data/FashionMNIST/raw --out data/fashion")
    parser.add_argument("--raw", required=True, metavar="FOLDER", help="folder of the four published files, gzipped or "
                        "not: {train,t10k}-{images-idx3,labels-idx1}-ubyte")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write: {train,val}/{0..9}/*.png")
    args = parser.parse_args(argv)
    keep_apart({"--out": args.out}, {"--raw": args.raw})
    written = prepare_fashion(args.raw, args.out)
    print(f"{args.out}: {'written' if written else 'is there already'}")


if __name__ == "__main__":
    run(main)
