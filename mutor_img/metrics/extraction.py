"""One pass of a feature network over an image set, on one process or shared by several.

The images are cut into fixed batches. In every round each process takes one batch, and the features come back in
index order, so that sums and rows are the same whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mutor_img.errors import UserError
from mutor_img.metrics.features import FeatureNetwork
from mutor_img.metrics.frechet import Moments, Statistics
from mutor_img.metrics.image_sets import ImageSet, rebatch


@dataclass
class Features:
    """What one pass yields, on the main process.

    Attributes:
        count: images.
        statistics: mean and covariance by output name ("pool", "spatial").
        rows: (N, D) float32 features on the CPU by output name, for the outputs that were kept.
    """

    count: int
    statistics: dict[str, Statistics]
    rows: dict[str, Tensor]

    def subset(self, chosen: Tensor) -> Features:
        """Return the features of the chosen images (n,) int64, with statistics for every output with kept rows."""
        rows = {name: values[chosen] for name, values in self.rows.items()}
        return Features(len(chosen), {n: _moments(rows[n]).finish() for n in self.statistics if n in rows}, rows)


def extract(
    images: ImageSet, network: FeatureNetwork, *, statistics: Collection[str], rows: Collection[str],
    count: int | None = None, batch_size: int = 64, progress: bool = False, title: str = "features",
) -> Features | None:
    """Run the network over the first ``count`` images (all by default).

    Under torch.distributed every process calls this with the same images; the result is on rank 0 and None
    elsewhere.

    Args:
        images: the image set.
        network: the feature network.
        statistics: outputs to gather moments of.
        rows: outputs to keep image by image.
        batch_size: images a process and round.
        progress: a bar with an ETA, on a terminal.
        title: of the bar.

    Raises:
        UserError: the set yields fewer images than its length, or they cannot be read.
    """
    count = len(images) if count is None else count
    rank, world = _processes()
    outputs = [name for name in network.dimensions if name in {*statistics, *rows}]
    moments = {name: Moments(network.dimensions[name]) for name in statistics}
    kept = {name: torch.empty(count if rank == 0 else 0, network.dimensions[name]) for name in rows}
    batches, done = rebatch(images, batch_size, count), 0
    hidden = None if progress and rank == 0 else True
    with tqdm(total=count, desc=title, unit="image", disable=hidden, mininterval=0.5) as bar:
        # Every process reads the whole round before any computes, so that a damaged file stops all of them.
        while round_ := list(islice(batches, world)):
            for features in _in_order(round_, network, outputs, batch_size, rank, world):
                size = len(features[outputs[0]])
                if rank == 0:
                    for name, one in moments.items():
                        one.update(features[name])
                    for name, values in kept.items():
                        values[done : done + size] = features[name]
                done += size
                bar.update(size)
    if done < count:
        raise UserError(f"{getattr(images, 'name', 'the image set')} yields {done} images, its length says {count}")
    if rank != 0:
        return None
    return Features(count, {name: one.finish() for name, one in moments.items()}, kept)


def _moments(rows: Tensor) -> Moments:
    moments = Moments(rows.shape[1])
    for part in rows.split(1024):
        moments.update(part)
    return moments


def _processes() -> tuple[int, int]:
    """Return (rank, number of processes)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _in_order(round_: list[np.ndarray], network: FeatureNetwork, outputs: list[str], batch_size: int, rank: int,
              world: int) -> Iterator[dict[str, Tensor]]:
    """Yield the features of each batch of a round, in index order, on the CPU."""
    if world == 1:
        features = network(round_[0])
        yield {name: features[name].cpu() for name in outputs}
        return
    widths = [network.dimensions[name] for name in outputs]
    mine = torch.zeros(batch_size, sum(widths), device=network.device)  # (B, all outputs side by side), padded
    if rank < len(round_):
        features = network(round_[rank])
        mine[: len(round_[rank])] = torch.cat([features[name] for name in outputs], 1)
    parts = [torch.empty_like(mine) for _ in range(world)]
    torch.distributed.all_gather(parts, mine)
    for batch, part in zip(round_, parts):
        yield dict(zip(outputs, part[: len(batch)].cpu().split(widths, 1)))
