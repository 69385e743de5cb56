"""A small classifier: the feature network for scores of digits and other small images, and the command that trains it.

Inception's features mean little for 32 x 32 digits, and its 2048 dimensions want tens of thousands of samples.
These are 64 numbers learnt on the images themselves, so that a thousand samples suffice for a Frechet distance.
Such a distance compares runs scored by one classifier; it is no FID. Any ImageFolder of small square images will do,
grey or RGB: how many channels and pixels the classifier takes is read off the images that it is trained on.
"""

from __future__ import annotations

if __name__ == "__main__":
    from mutor_img.common.threads import set_spinning

    set_spinning()  # before torch is loaded

import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mutor_img.common import cli
from mutor_img.common.errors import UserError, check_range, describing
from mutor_img.common.files import file_hash, read_record, write_atomic, write_sealed
from mutor_img.common.full_precision import full_precision
from mutor_img.common.locks import claim, folder_lock
from mutor_img.common.outputs import keep_apart, keep_unseen, refuse_strange_folder
from mutor_img.common.streams import Stream, bits, generator_seed, integers
from mutor_img.metrics.features import to_nchw
from mutor_img.metrics.image_sets import FolderImages, read_all

DEFAULT_FOLDER = Path("runs/mnist/classifier")
FEATURES = 64
SMALLEST, LARGEST = 8, 64  # pixels per side; three times halved, an image must leave something
WEIGHTS_FILE, ABOUT_FILE = "model.safetensors", "classifier.json"
_BATCH, _LEARNING_RATE, _SHIFT = 50, 3e-3, 2


def grey(images: np.ndarray | Tensor) -> Tensor:
    """uint8 images in either layout -> (B, 1, H, W) float32 in [0, 1], the mean of the channels."""
    return to_nchw(images).float().mean(1, keepdim=True) / 255


def rgb(images: np.ndarray | Tensor) -> Tensor:
    """uint8 images in either layout -> (B, 3, H, W) float32 in [0, 1]; grey is repeated."""
    pixels = to_nchw(images).float() / 255
    return pixels.expand(-1, 3, -1, -1)


class DigitNet(nn.Module):
    """Three convolutions of 3 x 3, each normalised and halved in size, then 64 features and the classes.

    Attributes:
        channels: 1 or 3, of the images.
        side: pixels per side of the images.
    """

    def __init__(self, classes: int = 10, channels: int = 1, side: int = 32):
        super().__init__()
        self.channels, self.side = channels, side
        widths = (channels, 16, 32, 64)
        self.blocks = nn.Sequential(*[
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in pairwise(widths)
        ])
        self.features = nn.Linear(widths[-1] * (side // 8) ** 2, FEATURES)
        self.classifier = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, channels, side, side) in [0, 1] -> features (B, 64) before their ReLU, logits (B, classes)."""
        x = self.blocks(images * 2 - 1)  # (B, 64, side // 8, side // 8)
        features = self.features(x.flatten(1))
        return features, self.classifier(F.relu(features))

    def read(self, images: np.ndarray | Tensor, name: str) -> Tensor:
        """uint8 images in either layout -> what :meth:`forward` takes.

        Raises:
            UserError: images of another size; ``name`` is what is named.
        """
        pixels = (grey if self.channels == 1 else rgb)(images)
        if pixels.shape[2:] != (self.side, self.side):
            raise UserError(f"{name}: {pixels.shape[3]} x {pixels.shape[2]} pixels; this classifier takes "
                            f"{self.side} x {self.side}; give images of that size, or train one on such images")
        return pixels


class DigitFeatures:
    """A trained :class:`DigitNet` as a feature network: "pool" (B, 64) and "logits" (B, classes)."""

    def __init__(self, net: DigitNet, class_names: Sequence[str], weights_hash: str,
                 device: torch.device | str = "cpu", name: str = "mnist"):
        self.name = name
        self.device = torch.device(device)
        self.net = net.eval().requires_grad_(False).to(self.device)
        self.class_names, self.weights_hash = list(class_names), weights_hash
        self.dimensions = {"pool": FEATURES, "logits": len(self.class_names)}
        self.warnings = ["features are those of a small classifier: scores compare runs scored by the same "
                         "classifier, not with published ones"]

    @full_precision()
    def __call__(self, images: np.ndarray | Tensor) -> dict[str, Tensor]:
        """(B, side, side, C) or (B, C, side, side) uint8 -> "pool" (B, 64) and "logits" (B, classes), float32."""
        pool, logits = self.net(self.net.read(torch.as_tensor(images).to(self.device), "the images"))
        return {"pool": pool, "logits": logits}


def load_digits(folder: str | os.PathLike = DEFAULT_FOLDER, device: torch.device | str = "cpu",
                name: str = "mnist") -> DigitFeatures:
    """Load the classifier that :func:`train` left in ``folder``, strictly: names, shapes and the file's hash.

    Args:
        folder: where it is.
        device: where it runs.
        name: what results call it.

    Raises:
        UserError: no classifier there, or one that is not whole.
    """
    folder = Path(folder)
    if not (folder / ABOUT_FILE).is_file():
        raise UserError(f"{folder}: no trained classifier ({ABOUT_FILE}); train one with python -m "
                        "mutor_img.metrics.digits, or name its folder with --features-weights")
    about = read_record(folder / ABOUT_FILE, "weights_sha256", "class_names", "image_size")
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise UserError(f"{weights}: no such file; remove the folder and train again")
    digest = file_hash(weights)
    if digest != about["weights_sha256"]:
        raise UserError(f"{weights}: sha256 begins {digest[:8]}, {ABOUT_FILE} says {str(about['weights_sha256'])[:8]}; "
                        "remove the folder and train again")
    # what it says of its size takes no memory before the weights agree
    with describing("classifier", folder / ABOUT_FILE), torch.device("meta"):
        net = DigitNet(len(about["class_names"]), about.get("channels", 1), about["image_size"])
    with describing("classifier", weights):
        net.load_state_dict(load_file(weights), strict=True, assign=True)
    return DigitFeatures(net, about["class_names"], digest, device, name)


def train(images: FolderImages, val: FolderImages, out: str | os.PathLike, *, seed: int = 0, epochs: int = 8) -> dict:
    """Train a classifier on an ImageFolder of small square images and save it; returns ``classifier.json``'s content.

    Deterministic in ``seed`` (on one number of threads): the initial weights, the order and the shifts of up to
    2 pixels are draws from it. A finished output of the same recipe is returned as it is. Where every image is grey,
    the classifier sees one channel, else three.

    Raises:
        UserError: no class folders, other classes in ``val``, images that are not square, too small or too large, or
            of another size or kind in ``val``, or an output of another recipe.
    """
    for one in (images, val):
        if one.class_names is None or len(one.class_names) < 2:
            raise UserError(f"{one.path}: no class folders; an ImageFolder has one subfolder per class")
    if images.class_names != val.class_names:
        raise UserError(f"{val.path} has the classes {', '.join(val.class_names)}, {images.path} "
                        f"{', '.join(images.class_names)}; they must be the same")
    check_range("epochs", epochs, 1, 10_000)
    out = Path(out)
    recipe = {"images_sha256": images.sha256(), "val_sha256": val.sha256(), "seed": seed, "epochs": epochs}
    if (out / ABOUT_FILE).exists():
        about = read_record(out / ABOUT_FILE)
        if about.get("recipe") != recipe:
            raise UserError(f"{out} holds a classifier of other images, seed or epochs; remove it or give another "
                            "--out")
        load_digits(out)
        return about
    begin = time.perf_counter()
    found, found_val = read_all(images), read_all(val)  # (N, H, W, 3) uint8
    height, width = images.size
    if height != width or not SMALLEST <= height <= LARGEST:
        raise UserError(f"{images.path}: {width} x {height} pixels; the classifier takes square images of "
                        f"{SMALLEST} to {LARGEST} pixels per side")
    channels = 1 if _is_grey(found) else 3
    if channels == 1 and not _is_grey(found_val):
        raise UserError(f"{val.path}: holds coloured images, {images.path} only grey ones; give images of one kind")
    with torch.random.fork_rng():
        torch.manual_seed(generator_seed(seed, Stream.INIT))
        net = DigitNet(len(images.class_names), channels, height)
    pixels, targets = net.read(found, str(images.path)), torch.from_numpy(images.labels)  # (N, C, H, W), (N,)
    val_pixels, val_targets = net.read(found_val, str(val.path)), torch.from_numpy(val.labels)
    _fit(net, pixels, targets, seed, epochs)
    with torch.no_grad():
        guesses = torch.cat([net(part)[1].argmax(1) for part in val_pixels.split(500)])
    accuracy = (guesses == val_targets).double().mean().item()
    write_atomic(out / WEIGHTS_FILE, lambda aside: aside.write_bytes(save(net.state_dict())))
    about = {"class_names": images.class_names, "accuracy": accuracy, "image_size": height, "channels": channels,
             "features": FEATURES, "train_images": len(images), "val_images": len(val),
             "seconds": round(time.perf_counter() - begin, 1), "weights_sha256": file_hash(out / WEIGHTS_FILE),
             "recipe": recipe}
    write_sealed(out / ABOUT_FILE, about)  # last: its presence says that the rest is whole
    return about


def _fit(net: DigitNet, pixels: Tensor, targets: Tensor, seed: int, epochs: int) -> None:
    """Run the epochs in place: AdamW, one-cycle learning rate, shifted images; leaves the net in eval mode."""
    count = len(pixels)
    steps = -(-count // _BATCH)
    optimiser = torch.optim.AdamW(net.parameters(), lr=_LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=epochs * steps)
    padded = F.pad(pixels, [_SHIFT] * 4)  # (N, C, H + 4, W + 4); a digit's background is 0
    planes, window = torch.arange(net.channels), torch.arange(net.side)
    net.train()
    with tqdm(total=epochs * steps, desc="classifier", unit="step", mininterval=1) as bar:
        for epoch in range(epochs):
            order = torch.argsort(bits(seed, Stream.ORDER, epoch, torch.arange(count)))
            for chosen in order.split(_BATCH):
                down = integers(2 * _SHIFT + 1, seed, Stream.AUGMENT, epoch, chosen, 0)  # (B,)
                right = integers(2 * _SHIFT + 1, seed, Stream.AUGMENT, epoch, chosen, 1)
                rows, columns = down[:, None] + window, right[:, None] + window  # (B, side)
                shifted = padded[chosen[:, None, None, None], planes[:, None, None], rows[:, None, :, None],
                                 columns[:, None, None, :]]  # (B, C, side, side)
                loss = F.cross_entropy(net(shifted)[1], targets[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    net.eval()


def _is_grey(images: np.ndarray) -> bool:
    """Tell whether the three channels of all images (N, H, W, 3) are one and the same."""
    return bool((images[..., :1] == images).all())


def main(argv: Sequence[str]) -> dict[str, Any]:
    """The command; see ``--help``. Returns what ``classifier.json`` holds."""
    parser = cli.Parser(
        description="Train the classifier whose features score samples of digits or other small images. A finished one "
                    "is reused.",
        example="python -m mutor_img.metrics.digits --images data/mnist/train --val data/mnist/val "
                f"--out {DEFAULT_FOLDER}")
    parser.add_argument("--images", required=True, help="ImageFolder of small square PNGs to train on, grey or RGB")
    parser.add_argument("--val", required=True, help="ImageFolder of held-out PNGs, for the accuracy")
    parser.add_argument("--out", default=str(DEFAULT_FOLDER), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the order and the shifts")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the images")
    args = parser.parse_args(argv)
    keep_apart({"--out": args.out}, {"--images": args.images, "--val": args.val})
    keep_unseen("--val", args.val, "--images", args.images)
    refuse_strange_folder("--out", args.out, {WEIGHTS_FILE, ABOUT_FILE}, "classifier")
    with claim(folder_lock(args.out)):
        about = train(FolderImages(args.images), FolderImages(args.val), args.out, seed=args.seed, epochs=args.epochs)
    print(f"classifier: {about['accuracy']:.2%} of {about['val_images']} held-out images recognised, "
          f"trained in {about['seconds']:.0f} s -> {args.out}")
    return about


if __name__ == "__main__":
    cli.run(main)
