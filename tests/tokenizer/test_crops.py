"""The centre crop, the random crop, and pixels as tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from mutor_img.common.errors import UserError
from mutor_img.common.images import to_uint8
from tokenizer.images.crops import (
    center_crop,
    center_rule,
    pixels,
    random_crop,
    random_rule,
    read_squares,
    ten_crop_rule,
    to_float,
)
from tokenizer.images.folder import list_images


def ramp(width, height):
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray((rows * 3 + columns).astype(np.uint8))


def test_an_image_of_the_right_size_is_left_alone():
    image = ramp(32, 32)
    assert np.array_equal(center_crop(image, 32), image)


@pytest.mark.parametrize("width, height", [(40, 24), (24, 41), (24, 24)])
def test_the_middle_is_kept(width, height):
    left, top = (width - 24) // 2, (height - 24) // 2
    image = ramp(width, height)
    assert np.array_equal(center_crop(image, 24), np.array(image)[top: top + 24, left: left + 24])


def test_large_images_are_halved_by_boxes_and_then_resized():
    image = ramp(70, 53)  # 53 -> 26 is below twice 16, so one halving and then 26 -> 16
    half = image.resize((35, 26), Image.Resampling.BOX)
    whole = half.resize((round(35 * 16 / 26), 16), Image.Resampling.BICUBIC)
    left = (whole.width - 16) // 2
    assert np.array_equal(center_crop(image, 16), np.array(whole)[:, left: left + 16])


def test_a_random_crop_follows_its_draws_and_stays_inside():
    image = ramp(60, 40)
    corners = {draws: np.array(random_crop(image, 32, 0.8, draws))
               for draws in ((0, 0, 0), (0, 0, 0.999), (0.999, 0.999, 0.999))}
    assert all(part.shape == (32, 32) for part in corners.values())
    assert corners[0, 0, 0].mean() < corners[0, 0, 0.999].mean()
    assert np.array_equal(corners[0.999, 0.999, 0.999], np.array(image)[8:, 28:])  # 32 of 40 rows: the smallest share


def test_pixels_survive_the_way_to_floats_and_back(image_folder):
    folder = list_images(image_folder())
    squares = read_squares(folder, 0, 1, 8, center_rule())
    stored = torch.from_numpy(np.array(Image.open(folder.path(0))))
    assert squares.shape == (1, 1, 8, 8) and torch.equal(squares[0, 0], stored)
    assert torch.equal(read_squares(folder, 0, 3, 8, center_rule()), squares.expand(-1, 3, -1, -1))
    everything = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(everything)), everything)
    assert pixels(Image.new("RGB", (4, 2))).shape == (3, 2, 4)


def test_an_image_that_would_grow_without_end_is_refused():
    assert center_crop(Image.new("L", (200, 1)), 64).size == (64, 64)
    with pytest.raises(ValueError, match="1 x 50000 pixels: one side is more than 200 times the other"):
        center_crop(Image.new("L", (1, 50000)), 64)


def test_ten_crops_are_corners_and_middle_of_the_image_and_of_its_mirror_image():
    image, side = ramp(53, 47), 20  # 20 * 1.1 = 22
    large = np.asarray(center_crop(image, 22))
    expected = []
    for seen in (large, large[:, ::-1]):
        expected += [seen[:20, :20], seen[:20, 2:], seen[2:, :20], seen[2:, 2:], seen[1:21, 1:21]]
    rule = ten_crop_rule(1.1)
    cut = rule.cut(image, side, 0)
    assert len(cut) == len(rule.squares) == 10 and rule.mirrored
    assert all(np.array_equal(a, b) for a, b in zip(cut, expected))


def test_random_crops_are_a_function_of_seed_image_and_view():
    image = ramp(60, 40)

    def cut(seed, number, count=6):
        return [np.asarray(square) for square in random_rule(0.5, count, seed).cut(
            image, 24, number)]

    first = cut(0, 3)
    assert all(np.array_equal(a, b) for a, b in zip(first, cut(0, 3, count=20)))  # further views change none
    others = [cut(0, 4), cut(1, 3)]
    assert all(any((a != b).any() for a, b in zip(first, other)) for other in others)
    assert len({square.tobytes() for square in first}) == 6 and all(square.shape == (24, 24) for square in first)
    rising = [np.diff(square.astype(int), axis=1).mean() > 0 for square in cut(0, 0, count=200)]
    assert 70 < sum(rising) < 130  # mirrored by a fair draw: 100 and a deviation of 7


def test_options_of_crop_rules_have_a_range():
    for rule, options in ((ten_crop_rule, {"scale": 0.9}), (random_rule, {"least": 1.1}), (random_rule, {"count": 0})):
        with pytest.raises(UserError, match="give a value in"):
            rule(**options)
