import numpy as np
import pytest
import torch

from mutor_img.common.errors import UserError
from mutor_img.metrics.memorisation import CopyRule, Repetition, distinct_share, grey_rows, nearest


def pictures(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)


def test_distinct_counts_different_images_and_one_byte_is_enough():
    images = pictures(4)[[0, 0, 1, 2, 0]]
    assert distinct_share(images) == 3 / 5
    images = images.copy()
    images[1, 0, 0, 0] ^= 1
    assert distinct_share(images) == 4 / 5


def test_nearest_is_brute_forces_and_a_copy_is_at_zero():
    training, images = grey_rows(pictures(30)), grey_rows(np.concatenate([pictures(20, 1), pictures(30)[7:8]]))
    distances, where = nearest(images, training)
    brute = np.linalg.norm(images.numpy()[:, None] - training.numpy()[None], axis=2)
    np.testing.assert_allclose(distances, brute.min(1), rtol=1e-6, atol=1e-6)
    assert where.tolist() == brute.argmin(1).tolist()
    assert (distances[-1].item(), where[-1].item()) == (0.0, 7)


def test_the_unit_is_grey_pixels_from_0_to_1():
    black, white = np.zeros((1, 6, 5, 3), np.uint8), np.full((1, 6, 5, 3), 255, np.uint8)
    assert nearest(grey_rows(white), grey_rows(black))[0].item() == pytest.approx(30**0.5)


def test_a_copy_is_nearer_than_every_held_out_image_of_its_class():
    rule = CopyRule.calibrate(torch.tensor([5.0, 4.0, 1.0, 2.0]), torch.tensor([0, 0, 1, 1]), 3)
    distances, classes = torch.tensor([3.9, 4.0, 0.9, 1.1, 0.5, 1.5]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert rule.copies(distances, classes) == 3  # 3.9 of class 0, 0.9 of class 1, 0.5 of class 2 (limit of all: 1)
    assert rule.expected(classes) == pytest.approx(4 / 3 + 2 / 5)


def test_repeated_training_images_are_copies_and_held_out_ones_are_not():
    training, held_out, fresh = pictures(30), pictures(10, 1), pictures(10, 2)
    repetition = Repetition(training, np.arange(30) % 2, held_out)
    blurred = (training[:8].astype(int) + 3).clip(0, 255).astype(np.uint8)
    assert repetition.scores(training[:8])["nearer_than_held_out"] == 8
    assert repetition.scores(blurred)["nearer_than_held_out"] == 8
    assert repetition.scores(held_out)["nearer_than_held_out"] == 0
    assert repetition.scores(fresh)["nearer_than_held_out"] < 8
    assert repetition.scores(training[:8])["nearest_training_distance"] == 0


def test_without_held_out_images_copies_are_not_counted():
    assert set(Repetition(pictures(9), None, None).scores(pictures(4, 1))) == {"distinct", "nearest_training_distance"}


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match="4 x 6 pixels"):
        Repetition(pictures(9), None, None).scores(pictures(4)[:, :, :4])
