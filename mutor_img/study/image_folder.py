"""Small images written once as an ImageFolder of PNGs, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from mutor_img.common.errors import UserError
from mutor_img.common.files import filling
from mutor_img.common.locks import claim, file_lock

PAD = 2  # 28 -> 32 pixels per side, with background


def prepare_folder(folder: str | Path, write: Callable[[Path], None]) -> bool:
    """Have ``write`` fill a folder aside, which then takes its name, unless that is there; returns whether it did.

    Raises:
        UserError: another process is writing there, or the folder holds other things than ``train`` and ``val``.
    """
    folder = Path(folder)
    with claim(file_lock(folder, keeps=True)):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            return False
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder}: holds other things than the folders train and val; give another folder")
        with filling(folder) as aside:
            write(aside)
    return True


def save_padded(path: Path, pixels: np.ndarray) -> None:
    """Write (28, 28) uint8 pixels as a PNG of 32 x 32, with background around them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.pad(pixels, PAD)).save(path)
