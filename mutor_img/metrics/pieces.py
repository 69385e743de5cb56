"""Is a drawn stroke whole? The connected pieces of bright pixels in images of bright strokes on a dark ground."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import generate_binary_structure, label

BRIGHT = 96  # grey level above which a pixel belongs to a stroke


def count_pieces(images: np.ndarray) -> np.ndarray:
    """Return the number of pieces in each image: (N, H, W, C) uint8 -> (N,) int64.

    A piece is a set of pixels whose mean over the channels is above :data:`BRIGHT`; pixels that touch by a side or a
    corner belong to one piece. An image without a bright pixel has none.
    """
    neighbours = generate_binary_structure(2, 2)  # (3, 3): sides and corners
    return np.array([label(image.mean(2) > BRIGHT, neighbours)[1] for image in images], dtype=np.int64)
