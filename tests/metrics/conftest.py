"""Small stand-ins: noise, folders of digits that are bars, Inception with random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from projection import Projection
from tiny_runs import write_generator, write_tokenizer

from mutor_img.metrics.digits import main as train_digits
from mutor_img.metrics.features import InceptionGraph


@pytest.fixture
def network():
    return Projection()


@pytest.fixture
def noise():
    """A function (count, seed) -> (count, 8, 8, 3) uint8."""
    return lambda count, seed=0: np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def bar_digits(count, seed):
    """Images (count, 32, 32) of one bright row each, at a height that is the class, and their labels (count,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.integers(0, 60, (count, 32, 32), dtype=np.uint8)
    for image, label in zip(images, labels):
        image[6 + 8 * label : 10 + 8 * label, 6:26] = rng.integers(150, 256, (4, 20))
    return images, labels


@pytest.fixture(scope="session")
def digit_folders(tmp_path_factory):
    """{"train": an ImageFolder of 60 bars in 3 classes, "val": one of 18}."""
    root = tmp_path_factory.mktemp("digits")
    for seed, (name, count) in enumerate((("train", 60), ("val", 18))):
        for i, (image, label) in enumerate(zip(*bar_digits(count, seed))):
            path = root / name / str(label) / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return {name: root / name for name in ("train", "val")}


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Inception weights drawn by Kaiming's rule: torch's own draw would leave features of 3e-8."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        graph = InceptionGraph()
        for module in graph.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(graph.state_dict(), path)
    return path


def coarse_noise(count, seed):
    """(count, 64, 64, 3) uint8 of upsampled low-resolution noise; per-pixel noise would look all alike to Inception."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return small.repeat(16, 1).repeat(16, 2)


@pytest.fixture(scope="session")
def coarse():
    return coarse_noise


@pytest.fixture(scope="session")
def coarse_images():
    return coarse_noise(6, 3)


@pytest.fixture(scope="session")
def classifier(digit_folders, tmp_path_factory):
    """The folder of a digit classifier that has seen the bars twice."""
    out = tmp_path_factory.mktemp("classifier")
    train_digits(["--images", str(digit_folders["train"]), "--val", str(digit_folders["val"]), "--out", str(out),
                  "--epochs", "2"])
    return out


@pytest.fixture
def run(random_model, tmp_path):
    """The run folder of a tiny generator (8 x 8 codes of 11, 3 classes) of grey 32-pixel images, with its tokenizer."""
    vq = write_tokenizer(tmp_path / "vq", multipliers=(1, 1, 2))
    return Path(write_generator(tmp_path / "run", random_model((8, 8)), vq, class_names=["0", "1", "2"], image_size=32))
