"""A sample is a function of its number, whoever reads it and when."""

import pytest
import torch
from PIL import Image

from mutor_img.common.errors import UserError
from tokenizer.images.folder import list_images
from tokenizer.training import images as training_images
from tokenizer.training.images import TrainingImages


def build(folder, **options):
    settings = {"seed": 3, "mirror": False, "crop_min": 1.0, "workers": 2, "global_batch": 4, "share": 4} | options
    return TrainingImages(list_images(folder), 1, 8, **settings)


@pytest.mark.parametrize("options", [{}, {"mirror": True}, {"mirror": True, "crop_min": 0.7}])
def test_a_sample_does_not_depend_on_its_batch(image_folder, options):
    folder = image_folder(size=11)
    samples = torch.arange(24)
    whole = build(folder, **options).batch(samples)
    reader = build(folder, **options)
    parts = [reader.batch(part) for part in samples.split(4)]  # reads ahead
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(build(folder, **options).batch(torch.tensor([17, 2])), whole[[17, 2]])


@pytest.mark.parametrize("world, micro_batch", [(1, 12), (1, 4), (2, 6), (2, 2), (3, 4), (4, 1)])
def test_what_is_read_ahead_is_what_a_process_asks_for_next(world, micro_batch, image_folder, monkeypatch):
    """Three updates of 12 samples, as rank 1 (or the only one) of so many processes sees them."""
    monkeypatch.setattr(training_images, "_CACHE_BYTES", 0)
    share, rank, read = 12 // world, min(1, world - 1), []
    reader = build(image_folder(), global_batch=12, share=share)
    one = reader._one
    monkeypatch.setattr(reader, "_one", lambda sample, item: read.append(sample) or one(sample, item))
    own = [update * 12 + rank * share + i for update in range(3) for i in range(share)]
    for begin in range(0, len(own), micro_batch):
        reader.batch(torch.tensor(own[begin:begin + micro_batch]))
    reader.batch(torch.tensor([100, 101]), ahead=False)  # a picture
    reader.batch(torch.tensor([36 + rank * share + i for i in range(micro_batch)]))
    reader.pool.shutdown()
    expected = own + [36 + rank * share + i for i in range(micro_batch)]
    assert sorted(read)[:len(expected)] == expected and len(read) == len(expected) + 2 + micro_batch


def test_an_epoch_holds_every_image_once(image_folder):
    reader = build(image_folder())
    first, second = reader.batch(torch.arange(12)), reader.batch(torch.arange(12, 24))
    assert not torch.equal(first, second)
    assert torch.equal(first.sum((1, 2, 3)).sort().values, second.sum((1, 2, 3)).sort().values)


def test_images_kept_and_images_read_again_are_the_same(image_folder, monkeypatch):
    folder, samples = image_folder(), torch.arange(20)
    kept = build(folder, mirror=True)
    monkeypatch.setattr(training_images, "_CACHE_BYTES", 0)
    read = build(folder, mirror=True)
    assert kept.cache is not None and read.cache is None
    assert torch.equal(kept.batch(samples), read.batch(samples))


@pytest.mark.parametrize("crop_min", [1.0, 0.7])
def test_an_image_that_cannot_be_cropped_is_named(crop_min, image_folder, monkeypatch):
    folder = image_folder()
    Image.new("L", (8, 4000)).save(folder / "b" / "0001.png")
    monkeypatch.setattr(training_images, "_CACHE_BYTES", 0)
    with pytest.raises(UserError, match=r"b/0001\.png: not a readable image \(8 x 4000 pixels"):
        build(folder, crop_min=crop_min).batch(torch.arange(12))


def test_mirroring_flips_about_half(image_folder):
    folder, samples = image_folder(), torch.arange(240)
    plain, mirrored = build(folder).batch(samples), build(folder, mirror=True).batch(samples)
    same = (plain == mirrored).flatten(1).all(1)
    assert torch.equal(mirrored[~same], plain[~same].flip(-1))
    assert 80 < int(same.sum()) < 160
