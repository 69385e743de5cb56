"""The centre crop, the random crop, and pixels as tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from mutor_img.errors import UserError
from mutor_img.images import to_uint8
from tokenizer.crops import center_crop, crop_rule, pixels, random_crop, read_squares, to_float
from tokenizer.folder import list_images


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
    squares = read_squares(folder, 0, 1, 8, crop_rule("center"))
    stored = torch.from_numpy(np.array(Image.open(folder.path(0))))
    assert squares.shape == (1, 1, 8, 8) and torch.equal(squares[0, 0], stored)
    assert torch.equal(read_squares(folder, 0, 3, 8, crop_rule("center")), squares.expand(-1, 3, -1, -1))
    everything = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(everything)), everything)
    assert pixels(Image.new("RGB", (4, 2))).shape == (3, 2, 4)


def test_an_unknown_rule_names_the_nearest():
    with pytest.raises(UserError, match="'center'"):
        crop_rule("centre")
