"""Arrays in files, written a part at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import BinaryIO

import numpy as np


def write_npy(file: BinaryIO, dtype: np.dtype | type, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """Write the bytes that ``numpy.save`` would; the parts join along the first axis.

    On a full disk numpy's own ways to a file end in an error that doesn't say so, or, memory-mapped, in a signal.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for part in parts:
        file.write(np.ascontiguousarray(part, dtype).data)
