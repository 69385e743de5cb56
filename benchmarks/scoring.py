"""What scoring costs: feature extraction beside torch-fidelity's own, and all metrics of a full-size evaluation.

    python -m benchmarks.scoring extraction                    # images per second, ours and theirs in turns
    python -m benchmarks.scoring frechet                       # one Frechet distance of 2048 features
    python -m benchmarks.scoring metrics                       # FID, IS, precision and recall of 50 000 against 10 000
    python -m benchmarks.scoring metrics --samples 5000 --reference-images 2000 --threads 1

Nothing is downloaded: Inception has random weights, which cost the same. The full-size evaluation goes through
``evaluate`` with a network that draws features in place of computing them, so that its seconds and its memory are
those of everything but the network.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import get_featuresdict_from_dataset

from benchmarks.turns import seconds
from mutor_img.common.cli import Parser, run
from mutor_img.common.errors import check_choice, check_range
from mutor_img.metrics.evaluator import evaluate
from mutor_img.metrics.extraction import extract
from mutor_img.metrics.frechet import Moments, Statistics, frechet_distance
from mutor_img.metrics.image_sets import ArrayImages
from mutor_img.metrics.inception import Inception, InceptionGraph
from mutor_img.metrics.references import Reference
from mutor_img.training.hardware import keep_freed_memory

PARTS = ("extraction", "frechet", "metrics")
POOL, CLASSES = 2048, 1008


class Drawn:
    """A feature network whose features are drawn, from the number that an image's first pixels hold."""

    name, weights_hash, device, warnings = "inception-v3-compat", "0" * 64, torch.device("cpu"), ()
    dimensions = {"pool": POOL, "logits": CLASSES}  # noqa: RUF012

    def __init__(self):
        # Not white: as in real features, few directions hold most of the variance.
        self.scale = 1 / (1 + torch.arange(POOL) / 64.0)

    def __call__(self, images: np.ndarray) -> dict[str, Tensor]:
        """(B, 1, 2, 3) uint8 -> (B, 2048) and (B, 1008)."""
        seed = int.from_bytes(np.ascontiguousarray(images[0, 0]).tobytes()[:4], "little")
        draws = torch.Generator().manual_seed(seed)
        pool = torch.randn(len(images), POOL, generator=draws) * self.scale
        return {"pool": (pool + 0.3).clamp(min=0), "logits": 3 * torch.randn(len(images), CLASSES, generator=draws)}


class Numbered:
    """An image set of ``count`` tiny images that hold their own numbers."""

    name, labels, size = "drawn", None, None

    def __init__(self, count: int, first: int):
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, self.count, 64):
            numbers = np.arange(self.first + start, self.first + min(start + 64, self.count), dtype="<u4")
            rows = np.zeros((len(numbers), 6), np.uint8)
            rows[:, :4] = numbers[:, None].view(np.uint8)
            yield rows.reshape(-1, 1, 2, 3)


class Pictures(Dataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, images: np.ndarray):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)  # (N, 3, H, W)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].contiguous()


def peak_gib() -> float:
    """Return the largest memory this process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def extraction(images: int, side: int, batch: int, rounds: int) -> None:
    """Print images per second of both, the median over rounds in which they take turns."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, side, side, 3), dtype=np.uint8)
    graph = InceptionGraph()
    with TemporaryDirectory() as folder:
        torch.save(graph.state_dict(), Path(folder) / "random.pth")
        theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                             str(Path(folder) / "random.pth"))
    ours, pictures = Inception(graph, "0" * 64), Pictures(pixels)
    wanted = {"statistics": {"pool", "spatial"}, "rows": {"pool", "logits"}, "batch_size": batch}
    work = {"torch-fidelity": lambda: get_featuresdict_from_dataset(pictures, theirs, batch, False, True, False),
            "ours": lambda: extract(ArrayImages(pixels), ours, **wanted)}
    for one in work.values():
        one()  # memory and kernels of these shapes are chosen on the first call
    times = [{name: seconds(one) for name, one in work.items()} for _ in range(rounds)]
    print(f"extraction, {images} images of {side} x {side}, batches of {batch}, {rounds} rounds in turns; ours also "
          "keeps the spatial features and both float64 moments")
    for name in work:
        print(f"  {name:<15} {images / statistics.median(t[name] for t in times):8.2f} images/s")
    print(f"  ratio           {statistics.median(t['torch-fidelity'] / t['ours'] for t in times):8.2f}")


def frechet(rounds: int) -> None:
    """Print the seconds of one distance between full-rank statistics."""
    draws = torch.Generator().manual_seed(0)
    both = []
    for _ in range(2):
        mixing = torch.randn(POOL, POOL, generator=draws, dtype=torch.float64) / POOL**0.5
        both.append(Statistics(torch.randn(POOL, generator=draws, dtype=torch.float64), mixing @ mixing.T))
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        times.append((seconds(lambda: frechet_distance(*both)), time.process_time() - begin))
    wall, cpu = map(statistics.median, zip(*times))
    print(f"frechet, {POOL} x {POOL}: {wall:.2f} s, {cpu:.2f} s of CPU (medians of {rounds})")


def metrics(samples: int, reference_images: int) -> None:
    """Print the seconds and the memory of FID, IS, precision and recall together."""
    network, moments, rows = Drawn(), Moments(POOL), []
    for batch in Numbered(reference_images, 10**8):
        rows.append(network(batch)["pool"] * 1.02)
        moments.update(rows[-1])
    reference = Reference("drawn", "mutor_img", role="generation", pool=moments.finish(),
                          pool_features=torch.cat(rows))
    del rows
    before, begin = peak_gib(), time.process_time()
    result = evaluate(Numbered(samples, 0), reference, network, metrics=["fid", "is", "pr"], progress=True)
    scores = {key: round(result[key], 4) for key in ("fid", "is", "precision", "recall")}
    cpu = time.process_time() - begin
    print(f"metrics, {samples} samples against {reference_images}: {result['seconds']:.0f} s, {cpu:.0f} s of CPU, most "
          f"memory {peak_gib():.2f} GiB ({before:.2f} before); {scores}")


def main(argv: Sequence[str]) -> None:
    """The command; see ``--help``."""
    parser = Parser(description="Measure feature extraction beside torch-fidelity's own, and the metrics at full size.",
                    example="python -m benchmarks.scoring extraction --images 64 --threads 1")
    parser.add_argument("part", metavar="PART", help=f"what to measure: {', '.join(PARTS)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of this process")
    parser.add_argument("--rounds", type=int, default=5, help="how often extraction and frechet are timed")
    parser.add_argument("--images", type=int, default=64, help="images whose features are extracted")
    parser.add_argument("--side", type=int, default=256, help="side of these images, in pixels")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time in extraction")
    parser.add_argument("--samples", type=int, default=50_000, help="samples that metrics scores")
    parser.add_argument("--reference-images", type=int, default=10_000, help="reference images of metrics")
    args = parser.parse_args(argv)
    check_choice("PART", args.part, PARTS)
    for name in ("threads", "rounds", "images", "side", "batch_size", "samples", "reference_images"):
        check_range(f"--{name.replace('_', '-')}", getattr(args, name), 1, 10**7)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the command does
    print(f"torch {torch.__version__}, {args.threads} threads")
    if args.part == "extraction":
        extraction(args.images, args.side, args.batch_size, args.rounds)
    elif args.part == "frechet":
        frechet(args.rounds)
    else:
        metrics(args.samples, args.reference_images)


if __name__ == "__main__":
    run(main)
