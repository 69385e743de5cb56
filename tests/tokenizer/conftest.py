"""A tokenizer of a few thousand weights, folders of tiny images, and commands run to their refusal."""

import shutil

import numpy as np
import pytest
import torch
from photographs import write_photographs
from PIL import Image

from mutor_img.checkpoints.folder import write_checkpoint
from tokenizer.images.folder import list_images
from tokenizer.network.vq import VQModel

TINY = {"image_channels": 1, "channels": 4, "multipliers": [1, 2], "blocks": 1, "latent_channels": 4, "code_dim": 3,
        "vocabulary": 16, "groups": 2, "attention": True}


@pytest.fixture
def tiny_vq():
    """A factory of small tokenizers for 8-pixel images with weights drawn at random."""

    def build(seed=0, **options):
        torch.manual_seed(seed)
        vq = VQModel(**TINY | options).eval().requires_grad_(False)
        for name, weight in vq.named_parameters():
            if weight.dim() == 1:  # biases and norms that are not the identity
                weight.add_(0.3 * torch.randn(weight.shape))
            if name == "quantize.embedding.weight":
                weight.mul_(torch.rand(len(weight), 1) + 0.5)
        vq.image_size = 8
        return vq

    return build


@pytest.fixture
def tokenizer_run(tmp_path, tiny_vq):
    """A factory of run folders that hold a small tokenizer."""

    def build(name="tokenizer", seed=0, **groups):
        vq = tiny_vq(seed)
        meta = {"kind": "tokenizer", "model": vq.options, "image_size": 8}
        write_checkpoint(tmp_path / name, 3, {"model": vq.state_dict(), **groups}, meta, keep=1)
        return tmp_path / name

    return build


@pytest.fixture
def image_folder(tmp_path):
    """A factory of image folders: smooth random pixels, grey, one sub-folder per class."""

    def build(name="images", classes=("a", "b", "c"), each=4, size=8):
        generator = np.random.default_rng(0)
        for label in classes:
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(each):
                coarse = Image.fromarray(generator.integers(0, 256, (3, 3), dtype=np.uint8))
                path = tmp_path / name / label / f"{number:04d}.png"
                coarse.resize((size, size), Image.Resampling.BILINEAR).save(path)
        return tmp_path / name

    return build


@pytest.fixture
def command(image_folder, tmp_path):
    """The arguments of a training run of seconds."""
    images = image_folder(size=16)
    config = tmp_path / "configs" / "tiny.yaml"
    config.parent.mkdir()
    config.write_text(f"""
data: {{images: {images}, val_images: {images}, image_size: 16, mirror: true, crop_min: 1.0, workers: 1}}
model: {{preset: mnist, channels: 8, vocabulary: 32, code_dim: 4}}
revival: {{after: 2, until: 1.0}}
optim: {{lr: 3.0e-3, weight_decay: 0.0}}
train: {{steps: 6, global_batch: 8, micro_batch: 4, precision: fp32, compile: false, log_every: 1, ema: 0.9,
        checkpoint_every: 3, validate_every: 6, picture_every: 6}}
""")
    return ["--config", str(config)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The photographs in class folders."""
    return write_photographs(tmp_path_factory.mktemp("imagenet") / "train")


@pytest.fixture(scope="module")
def flat(tree, tmp_path_factory):
    """The same photographs in one folder under numbered names, and name -> WordNet id."""
    root, source = tmp_path_factory.mktemp("flat"), list_images(tree)
    order = np.random.default_rng(1).permutation(len(source))
    labels = {}
    for number, index in enumerate(order):
        shutil.copy(source.path(index), root / f"ILSVRC2012_val_{number + 1:08d}.JPEG")
        labels[f"ILSVRC2012_val_{number + 1:08d}"] = source.classes[source.labels[index]]
    return root, labels
