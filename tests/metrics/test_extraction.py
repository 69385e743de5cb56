import numpy as np
import pytest
import torch

from mutor_img.common.errors import UserError
from mutor_img.metrics.extraction import extract
from mutor_img.metrics.image_sets import ArrayImages

ALL = {"statistics": {"pool", "spatial"}, "rows": {"pool", "logits"}, "batch_size": 4}


def images(count=21):
    return ArrayImages(np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))


def test_rows_come_in_order_and_statistics_are_theirs(network):
    found = extract(images(), network, **ALL)
    expected = network(images().images)
    torch.testing.assert_close(found.rows["logits"], expected["logits"])
    np.testing.assert_allclose(found.statistics["pool"].sigma, np.cov(expected["pool"].double().numpy().T), rtol=1e-4)
    assert set(found.rows) == {"pool", "logits"}


def test_a_subset_has_the_statistics_of_its_images(network):
    chosen = torch.tensor([1, 4, 5, 9, 20])
    part = extract(images(), network, **ALL).subset(chosen)
    alone = extract(ArrayImages(images().images[chosen.numpy()]), network, **ALL)
    torch.testing.assert_close(part.statistics["pool"].sigma, alone.statistics["pool"].sigma, rtol=1e-4, atol=1e-6)
    assert (part.count, set(part.statistics)) == (5, {"pool"})  # spatial rows were not kept


class Indexed(ArrayImages):
    """Says it holds 30 images and holds fewer; can be read anywhere."""

    def __len__(self):
        return 30


class Streamed:
    """The same, to be read from the beginning only."""

    def __init__(self, array):
        self.array = array

    def __len__(self):
        return 30

    def __iter__(self):
        yield self.array


@pytest.mark.parametrize("kind", [Indexed, Streamed])
def test_a_source_that_ends_early_is_refused(kind, network):
    with pytest.raises(UserError, match="yields 21 images, its length says 30"):
        extract(kind(images().images), network, **ALL)


def test_chosen_rows_and_the_images_themselves_can_be_kept(network):
    chosen = torch.tensor([0, 3, 4, 11, 20])
    found = extract(images(), network, chosen=chosen, pixels=True, **ALL)
    torch.testing.assert_close(found.rows["pool"], network(images().images)["pool"][chosen])
    np.testing.assert_array_equal(found.pixels, images().images)
    assert found.count == 21
