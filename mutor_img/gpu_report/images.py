"""Checks of all that has pixels in it: the tokenizer's training, encoding and decoding, and the features of scores."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mutor_img.common.config import OptimConfig, TrainConfig
from mutor_img.common.full_precision import full_precision
from mutor_img.common.images import write_png
from mutor_img.gpu_report.place import CheckFailed, Place, draw_convolutions, expect, in_double
from mutor_img.metrics.digits import DigitFeatures, DigitNet, grey
from mutor_img.metrics.evaluator import evaluate
from mutor_img.metrics.extraction import extract
from mutor_img.metrics.features import FeatureNetwork, to_nchw
from mutor_img.metrics.image_sets import ArrayImages
from mutor_img.metrics.inception import Inception, InceptionGraph
from mutor_img.pretraining.parity import FLOORS, PLAIN_FACTOR, rms_difference
from mutor_img.training.runtime import Runtime
from mutor_img.training.trainer import Trainer
from tokenizer.encode import encode_images
from tokenizer.images.crops import VIEWS, center_rule, read_squares, to_float
from tokenizer.images.folder import list_images
from tokenizer.network.quantizer import Quantised
from tokenizer.network.vq import VQModel
from tokenizer.train import TokenizerTask
from tokenizer.training.config import ImagesConfig, LossConfig, RevivalConfig, TokenizerConfig, VQConfig
from tokenizer.training.perceptual import LPIPS

CLASSES = [str(number) for number in range(10)]
SIZE = 32  # pixels a side
JUDGED = LossConfig(adversarial_weight=0.5, adversarial_start=0, discriminator_channels=8, discriminator_layers=1)
SCORE_TOLERANCE = {"precision": 0.03, "recall": 0.03}  # one of 48 samples on the edge of a neighbourhood


def random_images(count: int, channels: int, seed: int = 0) -> np.ndarray:
    """Return (count, 32, 32, channels) uint8 of noise in patches of 4 x 4 pixels."""
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 256, (count, SIZE // 4, SIZE // 4, channels), dtype=np.uint8)
    return small.repeat(4, 1).repeat(4, 2)


def write_images(folder: Path, count: int = 40, channels: int = 3) -> Path:
    """Write random images into a sub-folder for each of ten classes; returns the folder."""
    for number, image in enumerate(random_images(count, channels)):
        path = folder / CLASSES[number % len(CLASSES)] / f"{number:04d}.png"
        write_png(path, Image.fromarray(image if channels == 3 else image[..., 0]))
    return folder


@dataclass
class SmallVQ(VQConfig):
    """A tokenizer of 64 codes with every part of VQ-16 (norms, attention, three levels) and few channels."""

    def options(self) -> dict[str, Any]:
        return {**super().options(), "channels": 16, "multipliers": [1, 2, 2], "blocks": 1, "groups": 8,
                "latent_channels": 16, "vocabulary": 64}


def tokenizer_run(folder: Path, precision: str, fast: bool, loss: LossConfig | None = None,
                  train: dict[str, Any] | None = None) -> TokenizerConfig:
    """Return the config of a small tokenizer's run on the images of ``folder / "images"``."""
    schedule = {"steps": 100, "log_every": 1, "checkpoint_every": 0, "validate_every": 0, "picture_every": 0}
    return TokenizerConfig(
        run_dir=str(folder / "run"),
        data=ImagesConfig(str(folder / "images"), image_size=SIZE, crop_min=1.0, workers=1),
        model=SmallVQ(), loss=loss or LossConfig(), optim=OptimConfig(clip=0.0),
        revival=RevivalConfig(after=1, until=1.0),
        train=TrainConfig(**{**schedule, "global_batch": 4, "precision": precision, "compile": fast, **(train or {})}))


def tokenizer_trainer(place: Place, config: TokenizerConfig,
                      change: Callable[[TokenizerTask], None] = lambda task: None) -> Trainer:
    """Return the Trainer of a tokenizer with drawn weights; ``change`` may replace parts of its task."""
    task = TokenizerTask(config, place.runtime)
    draw_convolutions(task.model)
    change(task)
    return Trainer(task, config, place.runtime)


def tokenizer_tensors(trainer: Trainer) -> tuple[dict[str, Tensor], Quantised]:
    """Return losses and gradients of the first update by name, and what the quantiser made of its images."""
    logged = trainer.gradients()
    found = {name: logged[name] for name in ("loss", "discriminator")}
    for owner, network in (("", trainer.model), ("the discriminator's ", trainer.task.adversary.discriminator)):
        found |= {f"gradient of {owner}{name}": weight.grad for name, weight in network.named_parameters()}
    return found, trainer.task.seen[0][1]


def farther(unit: Tensor, indices: Tensor, codes: Tensor) -> float:
    """Return by how much chosen codes are at most farther than the nearest, in cosines.

    Args:
        unit: (B, C, h, w) unit latents.
        indices: (B, h*w) int64, the chosen codes.
        codes: (vocabulary, C) unit codes.
    """
    scores = unit.flatten(2).mT.double() @ codes.T.double()  # (B, h*w, vocabulary)
    return (scores.amax(-1) - scores.gather(-1, indices[..., None])[..., 0]).max().item()


def expect_nearest(found: Tensor, rounded: Tensor, true: Tensor, codes: Tensor, precision: str) -> str:
    """Check that chosen codes are the nearest but for rounding; returns how many different ones there are.

    Args:
        found: (B, h*w) int64, the chosen codes.
        rounded, true: (B, C, h, w) unit latents by uncompiled torch in that precision, and in float64.
        codes: (vocabulary, C) unit codes.

    Raises:
        CheckFailed: a code is farther from its latent than the nearest by more than rounding explains.
    """
    allowed = 2 * (PLAIN_FACTOR * (rounded - true).norm(dim=1).max().item() + FLOORS[precision])
    lacking = farther(true, found, codes)
    if not lacking <= allowed:
        raise CheckFailed(f"a code is farther from its latent than the nearest by {lacking:.3g} (in cosines) where "
                          f"{allowed:.3g} is allowed")
    return f"{len(found.unique())} different codes of {found.numel()}"


def check_tokenizer_step(place: Place, precision: str) -> str:
    """Codes, losses and every gradient of a compiled update, the discriminator's too, against float64.

    Rounding may decide between two codes, and all that follows hangs on which: the others are given those that the
    compiled update chose, which must be the nearest but for rounding. In fp32 in whole fp32, though training lets
    convolutions round to TF32: sums that nearly cancel, as a discriminator's biases have them, would be noise.
    """
    whole = full_precision() if precision == "fp32" else nullcontext()
    with tempfile.TemporaryDirectory() as folder, whole, torch.enable_grad():
        write_images(Path(folder) / "images")
        found, fast = tokenizer_tensors(tokenizer_trainer(
            place, tokenizer_run(Path(folder), precision, fast=True, loss=JUDGED)))

        def same_codes(task: TokenizerTask) -> None:
            task.model.quantize.nearest = lambda unit: fast.indices

        def wide(task: TokenizerTask) -> None:
            task.model, task.adversary.discriminator = in_double(task.model), in_double(task.adversary.discriminator)
            same_codes(task)

        trainers = [tokenizer_trainer(place, tokenizer_run(Path(folder), rounded, fast=False, loss=JUDGED), change)
                    for rounded, change in ((precision, same_codes), ("fp32", wide))]
        (plain, rounded), (exact, true) = (tokenizer_tensors(trainer) for trainer in trainers)
        codes = trainers[1].model.quantize.codes()
    used = expect_nearest(fast.indices, rounded.unit, true.unit, codes, precision)
    right = expect([rms_difference(name, found[name], plain[name], exact[name], precision) for name in found])
    return f"{right}; {used}"


def check_lpips(place: Place, precision: str, count: int = 2) -> str:
    """LPIPS of pairs of images, and its gradient, as a tokenizer's training computes it, against float64 features.

    In fp32 in whole fp32, though training lets convolutions round to TF32: what that may amount to after 13 of them is
    no measure of anything.
    """
    lpips = draw_convolutions(LPIPS())
    for head in lpips.heads:
        head.weight.abs_()  # as the published ones are, whose distances are positive
    exact = copy.deepcopy(lpips)
    exact.features = in_double(exact.features)
    images, others = to_float(torch.from_numpy(random_images(2 * count, 3)).permute(0, 3, 1, 2)).chunk(2)

    def tensors(network: LPIPS, device: torch.device, rounded: str) -> dict[str, Tensor]:
        leaf = others.to(device).requires_grad_()
        with full_precision(), torch.enable_grad(), Runtime(device).autocast(rounded):
            distance = network.to(device)(leaf, images.to(device))  # (count,)
            gradient, = torch.autograd.grad(distance.sum(), leaf)  # (count, 3, 32, 32)
        return {"distance": distance.detach().cpu(), "gradient": gradient.cpu()}

    cpu = torch.device("cpu")
    true, plain = tensors(exact, cpu, "fp32"), tensors(copy.deepcopy(lpips), cpu, precision)
    found = tensors(lpips, place.device, precision)
    return expect([rms_difference(name, found[name], plain[name], true[name], precision) for name in found])


def drawn_tokenizer() -> VQModel:
    """Return a small tokenizer with drawn weights, in eval mode on the CPU."""
    vq = draw_convolutions(VQModel(**SmallVQ().options()))
    vq.image_size, vq.path, vq.hash = SIZE, "none", "0" * 64
    return vq.eval().requires_grad_(False)


def check_encode(place: Place, count: int = 40) -> str:
    """A code store made on the device: verified, and every code the nearest to what a CPU makes of the image."""
    vq = drawn_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        source = list_images(write_images(Path(folder) / "images", count))
        store = encode_images(copy.deepcopy(vq).to(place.device), source, Path(folder) / "codes", runtime=place.runtime)
        store.verify()
        codes = torch.from_numpy(np.asarray(store.codes).astype(np.int64))  # (images, views, h*w)
        squares = [read_squares(source, number, 3, SIZE, center_rule())[0] for number in range(len(source))]
    pixels = to_float(torch.stack(squares))  # (images, 3, 32, 32)
    seen = torch.cat([VIEWS[view](pixels) for view in store.info.views])
    rounded, true = (F.normalize(network.latents(seen).double(), dim=1) for network in (vq, in_double(vq)))
    found = codes.transpose(0, 1).flatten(0, 1)  # (views * images, h*w)
    return f"{len(source)} images; {expect_nearest(found, rounded, true, vq.quantize.codes(), 'fp32')}"


def check_decode(place: Place, count: int = 16) -> str:
    """Pixels decoded on the device, in whole fp32 though GPUs would convolve in TF32, against float64."""
    vq = drawn_tokenizer()
    codes = torch.randint(vq.vocabulary, (count, 64), generator=torch.Generator().manual_seed(0))
    found = copy.deepcopy(vq).to(place.device).decode(codes).cpu()
    return expect([rms_difference("pixels", found, vq.decode(codes), in_double(vq).decode(codes), "fp32")])


def check_features(place: Place, network: str, count: int = 8) -> str:
    """The features that scores are made of, in whole fp32, against float64 on the CPU; weights are drawn."""
    images = random_images(count, 3)
    with torch.no_grad():
        if network == "inception":
            graph = draw_convolutions(InceptionGraph()).eval()
            make, exact = lambda device: Inception(copy.deepcopy(graph), "drawn", device), in_double(graph)(
                to_nchw(images))
        else:
            net = draw_convolutions(DigitNet()).eval()
            make, exact = lambda device: DigitFeatures(copy.deepcopy(net), CLASSES, "drawn", device), dict(
                zip(("pool", "logits"), in_double(net)(grey(images))))
    found, plain = (features_of(make(device), images) for device in (place.device, torch.device("cpu")))
    return expect([rms_difference(name, found[name], plain[name], exact[name], "fp32") for name in found])


def features_of(network: FeatureNetwork, images: np.ndarray) -> dict[str, Tensor]:
    """Return every output of a feature network, (B, dimension) by name, by the pass that scores make."""
    return extract(ArrayImages(images), network, statistics=(), rows=set(network.dimensions), batch_size=3).rows


def check_scores(place: Place, count: int = 48) -> str:
    """Every score of an evaluation on the device against those on the CPU, by a digit classifier of drawn weights."""
    net = draw_convolutions(DigitNet()).eval()
    samples, reference = (ArrayImages(random_images(count, 3, seed), np.arange(count) % 10) for seed in (0, 1))
    ours, theirs = (
        evaluate(samples, reference, DigitFeatures(copy.deepcopy(net), CLASSES, "drawn", device),
                 metrics=["fid", "is", "pr", "kid"]) for device in (place.device, torch.device("cpu")))
    names = [name for name, value in theirs.items() if isinstance(value, float) and name != "seconds"]
    wrong = [f"{name} is {ours[name]:.6g}, on the CPU {theirs[name]:.6g}" for name in names
             if not abs(ours[name] - theirs[name]) <= SCORE_TOLERANCE.get(name, 1e-3 * abs(theirs[name]) + 1e-6)]
    if wrong:
        raise CheckFailed("\n".join(wrong))
    return f"{', '.join(f'{name} {ours[name]:.4g}' for name in names)}, as on the CPU"
