"""Connected pieces, against a flood fill written for this test."""

import numpy as np
import pytest

from mutor_img.metrics.pieces import BRIGHT, count_pieces


def flooded(bright: np.ndarray) -> int:
    """Count the pieces of a (H, W) mask by filling one after the other."""
    left, count = {tuple(p) for p in np.argwhere(bright)}, 0
    while left:
        count += 1
        edge = [left.pop()]
        while edge:
            y, x = edge.pop()
            near = {(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            edge += near
    return count


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9])
def test_pieces_are_those_of_a_flood_fill(share):
    rng = np.random.default_rng(0)
    bright = rng.random((20, 9, 13)) < share
    images = np.where(bright, 97, 96).astype(np.uint8)[..., None].repeat(3, 3)
    assert count_pieces(images).tolist() == [flooded(one) for one in bright]


def test_corners_connect_dark_pixels_do_not_and_channels_are_averaged():
    image = np.zeros((3, 5, 5, 3), np.uint8)
    image[0, 1, 1] = image[0, 2, 2] = 255  # corner to corner
    image[1, 1, 1] = image[1, 1, 3] = 255
    image[1, 1, 2] = BRIGHT  # too dark for a bridge
    image[2, 0, 0, 0], image[2, 4, 4] = 255, (0, 100, 200)  # means 85 and 100
    assert count_pieces(image).tolist() == [1, 2, 1]
    assert count_pieces(np.zeros((0, 5, 5, 3), np.uint8)).tolist() == []
