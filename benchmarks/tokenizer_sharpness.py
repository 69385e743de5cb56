"""Does the adversarial term sharpen a small tokenizer? Runs with it and one without, on crops of photographs.

    python -m benchmarks.tokenizer_sharpness --out docs/adversarial.png

The photographs are those that scikit-image ships, halved; crops of 32 pixels from their left three quarters train, and
crops from the right quarter are held out. The runs share their first updates to the byte, and go on at a lower
learning rate. A few minutes of one core.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from mutor_img.common.cli import Parser, run
from mutor_img.common.config import load_config
from mutor_img.common.errors import check_range
from mutor_img.common.images import check_png, grid_picture, to_nhwc, write_png
from mutor_img.common.locks import claim, file_lock
from mutor_img.training.command import run_task
from tokenizer import load_tokenizer
from tokenizer.images.crops import to_float
from tokenizer.images.folder import list_images
from tokenizer.measures import psnr, sharpness, ssim
from tokenizer.train import TokenizerConfig, TokenizerTask
from tokenizer.training.images import read_all

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry")
SIZE, TRAIN, HELD_OUT, COLUMNS = 32, 240, 24, 10  # pixels per side; crops per photograph; pictures shown
CONFIG = """
data: {{images: {folder}/train, image_size: 32, mirror: true, crop_min: 1.0, workers: 1}}
model: {{preset: mnist, image_channels: 3, channels: 16, vocabulary: 256}}
revival: {{after: 20}}
loss: {{adversarial_weight: 1.0, adversarial_start: {start}, discriminator_channels: 32, discriminator_layers: 2}}
optim: {{lr: 2.0e-3, weight_decay: 0.0, warmup_steps: 20}}
train: {{steps: {start}, global_batch: 16, precision: fp32, compile: false, log_every: 50, checkpoint_every: 0,
        picture_every: 0}}
"""


def write_crops(folder: Path) -> None:
    """Cut crops of the photographs at places drawn with a fixed seed into ``folder/train`` and ``folder/val``."""
    draws = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        photograph = Image.fromarray(getattr(data, name)()).convert("RGB").reduce(2)
        width, height = photograph.size
        border = width * 3 // 4
        for part, count, left, right in (("train", TRAIN, 0, border), ("val", HELD_OUT, border, width)):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                x, y = draws.integers(left, right - SIZE + 1), draws.integers(0, height - SIZE + 1)
                photograph.crop((x, y, x + SIZE, y + SIZE)).save(folder / part / name / f"{number:03d}.png")


def train_all(folder: Path, weights: Sequence[float], start: int, steps: int, lr: float) -> dict[str, Path]:
    """Train to ``start`` by L2 alone, then to ``steps`` at the rate ``lr``, once for each weight of the term.

    Returns:
        The run folders by weight; first the one without the term.
    """
    path = folder / "tokenizer.yaml"
    path.write_text(CONFIG.format(folder=folder, start=start))

    def train(run_dir: Path, *overrides: str) -> None:
        run_task(TokenizerTask, load_config(TokenizerConfig, path, [f"run_dir={run_dir}", *overrides]))

    train(folder / "shared")
    runs = {"L2 alone" if weight == 0 else f"{weight:g}": folder / f"weight_{weight:g}" for weight in (0.0, *weights)}
    for weight, run_dir in zip((0.0, *weights), runs.values()):
        shutil.copytree(folder / "shared", run_dir)
        train(run_dir, f"train.steps={steps}", f"optim.lr={lr}", f"loss.adversarial_weight={weight}")
    return runs


def compare(folder: Path, runs: dict[str, Path]) -> Image.Image:
    """Print the runs' scores on the held-out crops; returns a picture of some, a row per run below the photographs'."""
    crops = list_images(folder / "val")
    with ThreadPoolExecutor(1) as pool:
        pixels = to_float(read_all(crops, range(len(crops)), 3, SIZE, pool))  # (n, 3, 32, 32)
    before = to_nhwc(pixels)  # (n, 32, 32, 3)
    shown = np.linspace(0, len(before) - 1, COLUMNS).astype(int)
    rows = [before[shown]]
    print(f"\n{len(before)} held-out crops  PSNR, dB    SSIM  sharpness")
    for name, run_dir in runs.items():
        vq = load_tokenizer(run_dir)
        after = to_nhwc(vq.decode(vq.encode(pixels)))
        ratio = sharpness(after) / sharpness(before)
        print(f"{name:<18} {psnr(before, after):>9.2f} {ssim(before, after):>7.3f} {ratio:>10.2f}")
        rows.append(after[shown])
    return grid_picture(np.concatenate(rows), COLUMNS, row_names=["photograph", *runs])


def main(argv: Sequence[str]) -> None:
    """Train, print what was measured, and draw held-out crops."""
    parser = Parser(description=__doc__.splitlines()[0],
                    example="python -m benchmarks.tokenizer_sharpness --out docs/adversarial.png")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.002, 0.005, 0.02],
                        help="weights of the adversarial term, a run for each")
    parser.add_argument("--start", type=int, default=600, help="first update of the adversarial term")
    parser.add_argument("--steps", type=int, default=1000, help="updates in all")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate from --start on")
    parser.add_argument("--out", type=Path, metavar="PNG", help="picture of held-out crops, before and after")
    options = parser.parse_args(argv)
    check_range("--steps", options.steps, options.start, 10**6)
    check_png(options.out)
    with claim(file_lock(options.out)), tempfile.TemporaryDirectory() as name:
        write_crops(Path(name))
        runs = train_all(Path(name), options.weights, options.start, options.steps, options.lr)
        picture = compare(Path(name), runs)
        if options.out:
            write_png(options.out, picture)


if __name__ == "__main__":
    run(main)
