import numpy as np
import pytest
import torch
from projection import Projection

from mutor_img.errors import UserError
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


def test_a_source_that_ends_early_is_refused(network):
    class Short(ArrayImages):
        def __len__(self):
            return 30

        def __iter__(self):
            yield self.images

    with pytest.raises(UserError, match="yields 21 images, its length says 30"):
        extract(Short(images().images), network, **ALL)


def process(rank, world, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    found = extract(images(), Projection(), **ALL)
    assert (found is None) == (rank != 0)
    if rank == 0:
        torch.save([found.rows, found.statistics["pool"].sigma], f"{folder}/found.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_get_the_bits_of_one(tmp_path, network):
    torch.multiprocessing.spawn(process, (2, tmp_path), nprocs=2)
    rows, sigma = torch.load(tmp_path / "found.pt")
    alone = extract(images(), network, **ALL)
    assert all(torch.equal(rows[name], alone.rows[name]) for name in alone.rows)
    assert torch.equal(sigma, alone.statistics["pool"].sigma)
