"""Some images of a set, or all of them smaller: the same whether the set is read at any place or streamed."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mutor_img.common.errors import UserError
from mutor_img.metrics.image_sets import ArrayImages, FolderImages, NpzImages, read_all, shares
from mutor_img.metrics.views import Resized, Subset

LABELS = np.arange(150) // 50  # in class order


@pytest.fixture
def sets(noise, tmp_path):
    """The same images in memory, as a folder and as an npz, which can only be streamed."""
    images = noise(150)
    np.savez(tmp_path / "x.npz", arr_0=images, arr_1=LABELS)
    for number, (image, label) in enumerate(zip(images, LABELS)):
        path = tmp_path / "folder" / str(label) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return {"array": ArrayImages(images, LABELS), "folder": FolderImages(tmp_path / "folder"),
            "npz": NpzImages(tmp_path / "x.npz")}


@pytest.mark.parametrize("kind", ["array", "folder", "npz"])
@pytest.mark.parametrize("chosen", [[0], [149], [0, 1, 2, 63, 64, 65, 149], list(range(3, 150, 7)), list(range(150))])
def test_a_subset_is_the_chosen_images_in_their_order(sets, noise, kind, chosen):
    subset = Subset(sets[kind], torch.tensor(chosen))
    assert len(subset) == len(chosen) and subset.labels.tolist() == LABELS[chosen].tolist()
    assert np.array_equal(read_all(subset), noise(150)[chosen]) and np.array_equal(read_all(subset), noise(150)[chosen])
    assert (subset.name, subset.size) == (sets[kind].name, (8, 8)) and hasattr(subset, "read") == (kind != "npz")


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_processes_share_a_subset(sets, noise, kind):
    subset = Subset(sets[kind], torch.arange(0, 150, 4))  # 38 images
    parts = [list(shares(subset, 5, 38, rank, 3)) for rank in range(3)]
    batches = [part for round_ in zip(*parts) for part in round_ if part is not None]
    assert np.array_equal(np.concatenate(batches), noise(150)[::4])


@pytest.mark.parametrize("kind", ["array", "folder", "npz"])
def test_smaller_images_are_those_of_llamagens_rule(sets, noise, kind):
    resized = Resized(sets[kind], 6)
    pixels = torch.from_numpy(noise(150)).permute(0, 3, 1, 2) / 127.5 - 1
    expected = torch.clamp(127.5 * F.interpolate(pixels, size=(6, 6), mode="bicubic") + 128.0, 0, 255)
    assert np.array_equal(read_all(resized), expected.permute(0, 2, 3, 1).to(torch.uint8).numpy())
    assert (resized.size, resized.resize, len(resized)) == ((6, 6), 6, 150) and np.array_equal(resized.labels, LABELS)
    assert np.array_equal(read_all(Subset(resized, torch.tensor([7, 90]))), read_all(resized)[[7, 90]])


def test_images_of_the_size_that_is_asked_for_stay_as_they_are_and_none_grows(sets, noise):
    assert np.array_equal(read_all(Resized(sets["npz"], 8)), noise(150))
    with pytest.raises(UserError, match="none is made larger"):
        Resized(sets["npz"], 9)
    with pytest.raises(UserError, match="only square ones"):
        Resized(ArrayImages(noise(2)[:, :4]), 2)
