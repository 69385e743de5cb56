"""Small files of the kinds that the project writes: 8-pixel images, and models of a few numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from mutor_img.blocks import ModelConfig
from mutor_img.checkpoints.folder import write_checkpoint
from mutor_img.common.files import file_hash, write_sealed
from mutor_img.metrics.digits import ABOUT_FILE, WEIGHTS_FILE, DigitNet
from mutor_img.metrics.frechet import Statistics
from mutor_img.metrics.references import save_reference
from mutor_img.transformer import Transformer
from tokenizer.loading import load_tokenizer
from tokenizer.network.vq import VQModel

CLASSES = ["cat", "dog", "fox"]
_TOKENIZER = {"image_channels": 1, "channels": 8, "multipliers": (1, 2), "blocks": 1, "latent_channels": 8,
              "code_dim": 4, "vocabulary": 16, "groups": 4, "attention": False}


def write_images(folder: Path, count: int = 12, side: int = 8) -> Path:
    """Write a folder of grey PNGs of noise in three classes."""
    draw = np.random.default_rng(0)
    for number in range(count):
        path = folder / CLASSES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (side, side), np.uint8)).save(path)
    return folder


def write_tokenizer(run: Path) -> VQModel:
    """Write the run of a tokenizer with drawn weights, 8 x 8 pixels to 4 x 4 codes of 16; returns it loaded."""
    torch.manual_seed(0)
    vq = VQModel(**_TOKENIZER)
    write_checkpoint(run, 1, {"model": vq.state_dict()},
                     {"kind": "tokenizer", "model": vq.options, "image_size": 8}, 1)
    return load_tokenizer(run)


def write_generator(run: Path, vq: VQModel, steps: tuple[int, ...] = (1, 2)) -> Path:
    """Write the run of a generator with drawn weights, a checkpoint for each of some steps."""
    torch.manual_seed(1)
    model = Transformer(ModelConfig(1, 1, 16, (4, 4), 16, 3))
    nn.init.normal_(model.output.weight)
    moments = {f"exp_avg/{name}": weight * 0.5 for name, weight in model.state_dict().items()}
    about = {"kind": "generator", "model": model.config.to_json(), "seconds": 1.5, "codes": {
        "tokenizer": vq.path, "tokenizer_hash": vq.hash, "class_names": CLASSES, "image_size": 8}}
    for step in steps:
        write_checkpoint(run, step, {"model": model.state_dict(), "ema": model.state_dict(), "optimizer": moments},
                         about, len(steps))
    return run


def write_reference(path: Path) -> Path:
    """Write a statistics file."""
    draw = torch.Generator().manual_seed(2)
    rows = torch.randn(20, 4, generator=draw)
    return save_reference(path, role="generation", name="drawn", source_hash=None, network="inception",
                          weights_hash="0" * 64, pool=Statistics(rows.double().mean(0), rows.double().T.cov(), 20),
                          spatial=None, pool_features=rows, size=(8, 8))


def write_classifier(folder: Path, side: int = 8) -> Path:
    """Write a classifier of square grey images with drawn weights."""
    torch.manual_seed(3)
    folder.mkdir(parents=True)
    save_file(DigitNet(3, 1, side).state_dict(), folder / WEIGHTS_FILE)
    write_sealed(folder / ABOUT_FILE, {"class_names": CLASSES, "image_size": side, "channels": 1,
                                       "weights_sha256": file_hash(folder / WEIGHTS_FILE)})
    return folder
