"""Scoring in several processes: the numbers of one, and a mistake of one ends all."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launching import join, launch
from PIL import Image
from projection import Projection

from mutor_img.common.errors import UserError
from mutor_img.common.files import read_json
from mutor_img.evaluation.command import main
from mutor_img.metrics.extraction import extract
from mutor_img.metrics.image_sets import ArrayImages, FolderImages

OPTIONS = {"statistics": {"pool", "spatial"}, "rows": {"pool", "logits"}, "batch_size": 4}


class Stream:
    """Images that can be read from the beginning only."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __iter__(self):
        yield from np.array_split(self.images, 5)


def images():
    return np.random.default_rng(0).integers(0, 256, (21, 8, 8, 3), dtype=np.uint8)


def extracted():
    found = extract(ArrayImages(images()), Projection(), pixels=True, **OPTIONS)
    streamed = extract(Stream(images()), Projection(), **OPTIONS)
    if found is None:
        return None
    for one in (found, streamed):
        yield from (one.rows["pool"], one.rows["logits"], one.statistics["pool"].sigma, one.statistics["spatial"].sigma)
    yield torch.from_numpy(found.pixels)


def process(arguments, rank, world, port, folder):
    join(rank, world, port)
    result = main(arguments)
    assert bool(result) == (rank == 0)
    torch.save(list(extracted()), f"{folder}/three_{rank}.pt")
    with pytest.raises(UserError, match=r"5\.png: not a readable image"):  # one process reads it, all of them stop
        extract(FolderImages(f"{folder}/damaged"), Projection(), **OPTIONS)
    dist.destroy_process_group()
    if rank < 2:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        torch.save(list(extracted()), f"{folder}/two_{rank}.pt")
        dist.destroy_process_group()


def test_two_and_three_processes_get_the_numbers_of_one(run, digit_folders, classifier, processes, tmp_path):
    (tmp_path / "damaged").mkdir()
    for index, image in enumerate(images()[:9]):
        Image.fromarray(image).save(tmp_path / "damaged" / f"{index}.png")
    (tmp_path / "damaged" / "5.png").write_bytes(b"no picture")
    arguments = ["--checkpoint", str(run), "--num-samples", "30", "--batch-size", "8", "--features", "mnist",
                 "--features-weights", str(classifier), "--reference", str(digit_folders["train"]), "--device", "cpu"]
    expected = main(arguments)
    arguments += ["--json", str(tmp_path / "s.json")]
    assert launch(processes, 3, partial(process, arguments), tmp_path) == [0] * 3
    found = read_json(tmp_path / "s.json")
    assert found | {"seconds": 0} == expected | {"seconds": 0}
    alone = list(extracted())
    for name in ("three", "two"):
        shared = torch.load(tmp_path / f"{name}_0.pt")
        assert len(shared) == len(alone) and all(map(torch.equal, shared, alone))
        assert torch.load(tmp_path / f"{name}_1.pt") == []
