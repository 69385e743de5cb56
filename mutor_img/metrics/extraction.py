"""One pass of a feature network over an image set, on one process or shared by several.

The images are cut into fixed batches. In every round each process takes one batch, and the features come back in
index order, so that sums and rows are the same whatever the number of processes. What one of them cannot read stops
all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from mutor_img.common.errors import UserError
from mutor_img.common.processes import agree, place, share_mistake
from mutor_img.metrics.features import FeatureNetwork
from mutor_img.metrics.frechet import Moments, Statistics
from mutor_img.metrics.image_sets import ImageSet, content, shares


@dataclass
class Features:
    """What one pass yields, on the main process.

    Attributes:
        count: images.
        statistics: mean and covariance by output name ("pool", "spatial").
        rows: (N, D) float32 features on the CPU by output name, for the outputs that were kept;
            N is the number of images, or of the chosen ones.
        pixels: (N, H, W, C) uint8, the images themselves where they were asked for.
    """

    count: int
    statistics: dict[str, Statistics]
    rows: dict[str, Tensor]
    pixels: np.ndarray | None = None

    def subset(self, chosen: Tensor) -> Features:
        """Return the features of the chosen images (n,) int64, with statistics for every output with kept rows."""
        rows = {name: values[chosen] for name, values in self.rows.items()}
        statistics = {n: _moments(rows[n]).finish() for n in self.statistics if n in rows}
        return Features(len(chosen), statistics, rows, None if self.pixels is None else self.pixels[chosen.numpy()])


def extract(
    images: ImageSet, network: FeatureNetwork, *, statistics: Collection[str], rows: Collection[str],
    chosen: Tensor | None = None, pixels: bool = False, batch_size: int = 64,
    progress: bool = False, title: str = "features",
) -> Features | None:
    """Run the network over all images.

    Under torch.distributed every process calls this with the same images; the result is on rank 0 and None
    elsewhere.

    Args:
        images: the image set.
        network: the feature network.
        statistics: outputs to gather moments of.
        rows: outputs to keep image by image.
        chosen: ascending numbers (n,) int64 of the images whose rows are kept; None: all.
        pixels: keep the images too, for small ones.
        batch_size: images per process and round.
        progress: a bar with an ETA.
        title: of the bar.

    Raises:
        UserError: the set yields fewer images than its length, they cannot be read, or processes have other ones; on
            every process alike.
    """
    count = len(images)
    rank, world = place()
    if world > 1:
        agree({f"of the {title}, {what}": value for what, value in (
            ("the number", count), ("the content", content(images)), ("the feature network", network.weights_hash),
            ("the statistics", sorted(statistics)), ("the rows", sorted(rows)))})
    outputs = [name for name in network.dimensions if name in {*statistics, *rows}]
    moments = {name: Moments(network.dimensions[name]) for name in statistics}
    chosen = torch.arange(count) if chosen is None else chosen
    kept = {name: torch.empty(len(chosen) if rank == 0 else 0, network.dimensions[name]) for name in rows}
    seen: list[np.ndarray] = []
    own, done = shares(images, batch_size, count, rank, world), 0
    with tqdm(total=count, desc=title, unit="image", disable=not progress or rank != 0, delay=2,
              mininterval=1.0) as bar:
        while done < count:
            sizes = [min(batch_size, count - first)
                     for first in range(done, min(done + batch_size * world, count), batch_size)]
            for size, features, part in _round(own, network, outputs, sizes, pixels, rank, world):
                if rank == 0:
                    for name, one in moments.items():
                        one.update(features[name])
                    low, high = torch.searchsorted(chosen, torch.tensor([done, done + size])).tolist()
                    for name, values in kept.items():
                        values[low:high] = features[name][chosen[low:high] - done]
                    seen += [part] if pixels else []
                done += size
                bar.update(size)
    if rank != 0:
        return None
    return Features(count, {name: one.finish() for name, one in moments.items()}, kept,
                    np.concatenate(seen) if pixels else None)


def _moments(rows: Tensor) -> Moments:
    moments = Moments(rows.shape[1])
    for part in rows.split(1024):
        moments.update(part)
    return moments


def _round(own: Iterator[np.ndarray | None], network: FeatureNetwork, outputs: list[str], sizes: list[int],
           pixels: bool, rank: int, world: int) -> Iterator[tuple[int, dict[str, Tensor], np.ndarray | None]]:
    """Yield number, features (on the CPU) and images, where wanted, of each batch of a round, in index order."""
    if world == 1:
        batch = next(own)
        features = network(batch)
        yield len(batch), {name: features[name].cpu() for name in outputs}, batch if pixels else None
        return
    widths = [network.dimensions[name] for name in outputs]
    # (B, all outputs side by side); B is that of the first and fullest batch of the round, the others are padded
    mine, batch, error = torch.zeros(sizes[0], sum(widths), device=network.device), None, None
    try:
        batch = next(own)
        if batch is not None:
            features = network(batch)
            mine[: len(batch)] = torch.cat([features[name] for name in outputs], 1)
    except UserError as mistake:
        error = str(mistake)
    share_mistake(error)
    parts, images = [torch.empty_like(mine) for _ in range(world)], [None] * world
    dist.all_gather(parts, mine)
    if pixels:
        dist.all_gather_object(images, batch)
    for size, part, image in zip(sizes, parts, images):
        yield size, dict(zip(outputs, part[:size].cpu().split(widths, 1))), image
