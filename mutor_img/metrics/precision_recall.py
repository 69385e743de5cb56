"""Improved precision and recall: the share of one set inside the k-nearest-neighbour manifold of the other.

Source: Kynkaanniemi et al. 2019. Distances are single precision; ADM's are half precision, which reads
0.002-0.003 higher.

A tile of distances is one matrix product, ``|x|^2 + |y|^2 - 2 x.y``, whose rounding error has a known bound.
Wherever a decision lies within that bound (ties, duplicates, an image against itself) the distance is computed
again from the differences in double precision. So the counts are those of a brute-force comparison, at the price
of the matrix products, in memory that grows with the tile and not with the square of the sets.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from mutor_img.common.errors import UserError
from mutor_img.common.full_precision import full_precision

NEIGHBOURS = 3
_ROWS = 4096
_COLUMNS = 8192
_SPARE = 6  # neighbours kept beyond the k-th, so that the exact order is nearly always among them


@full_precision()
def precision_recall(
    samples: Tensor, reference: Tensor, *, neighbours: int = NEIGHBOURS, progress: bool = False
) -> tuple[float, float]:
    """Return (precision, recall), each a share in [0, 1].

    Precision is the share of samples within the reach of some reference image, the reach being the distance to
    that image's k-th nearest other reference image; recall is the reverse. Bounds are inclusive.

    Args:
        samples: (N, D) float32 features, on the CPU or a GPU.
        reference: (M, D) float32 features.
        neighbours: k.
        progress: show a bar with an ETA.

    Raises:
        UserError: a set has no k other images, the numbers of features differ, or there is a NaN.
    """
    for name, one in (("samples", samples), ("reference", reference)):
        if one.shape[0] <= neighbours:
            raise UserError(f"precision and recall need more than {neighbours} {name}; there are {one.shape[0]}")
        if not torch.isfinite(one).all():
            raise UserError(f"the features of the {name} hold NaN or infinity; look at the images and at the weights")
    if samples.shape[1] != reference.shape[1]:
        raise UserError(f"samples have {samples.shape[1]} features, the reference {reference.shape[1]}; "
                        "both must come from one network")
    centre = reference.double().mean(0).float()  # near the data, norms are small and so is the rounding error
    samples, reference = _Set(samples.float(), centre), _Set(reference.float(), centre)
    steps = sum(-(-a.count // _ROWS) for a in (samples, reference, samples))
    with tqdm(total=steps, desc="precision, recall", disable=not progress, leave=False, delay=2,
              mininterval=1.0) as bar:
        reach_samples = _reach(samples, neighbours, bar)  # (N,)
        reach_reference = _reach(reference, neighbours, bar)  # (M,)
        inside_reference, inside_samples = _inside(samples, reference, reach_samples, reach_reference, bar)
    return inside_reference.double().mean().item(), inside_samples.double().mean().item()


class _Set:
    """Features with the squared norms of their centred rows; tiles are centred as they are cut."""

    def __init__(self, features: Tensor, centre: Tensor):
        self.features, self.centre = features, centre.to(features.device)
        self.count = len(features)
        self.norms = torch.cat([(part - self.centre).double().square().sum(1) for part in features.split(_COLUMNS)])

    def tiles(self, size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield up to ``size`` rows at a time: where they are, centred (rows, D), and their squared norms (rows,)."""
        for start in range(0, self.count, size):
            rows = slice(start, min(start + size, self.count))
            yield rows, self.features[rows] - self.centre, self.norms[rows].float()


def _tile_distances(x: Tensor, x_norms: Tensor, y: Tensor, y_norms: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared distances (R, C) and, a row, what no rounding error in it can exceed (R, 1)."""
    squared = torch.addmm(y_norms[None, :], x, y.T, alpha=-2).add_(x_norms[:, None])
    # A dot product of D terms errs by at most D u |x||y|; norms, sums and centring add a few u.
    unit = torch.finfo(torch.float32).eps / 2
    return squared, (x.shape[1] + 16) * unit * (x_norms[:, None] + y_norms.max())


def _exact(x: Tensor, rows: Tensor, y: Tensor, columns: Tensor) -> Tensor:
    """Squared distances of the pairs x[rows], y[columns] (P,), in double precision from the differences."""
    parts = [(x[i].double() - y[j].double()).square().sum(1)
             for i, j in zip(rows.split(_ROWS), columns.split(_ROWS))]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=x.device)


def _reach(points: _Set, neighbours: int, bar: tqdm) -> Tensor:
    """Squared distance of each point to its k-th nearest other point, (N,) float64.

    A point itself is the nearest at distance 0, so the k-th other is number k + 1 in order.
    """
    wanted = neighbours + 1
    kept = min(wanted + _SPARE, points.count)
    reach = []
    for rows, x, x_norms in points.tiles(_ROWS):
        values = x.new_full((x.shape[0], 0), 0.0)  # (R, kept so far)
        where = torch.zeros(x.shape[0], 0, dtype=torch.int64, device=x.device)
        bound = x.new_zeros(x.shape[0], 1)
        for columns, y, y_norms in points.tiles(_COLUMNS):
            squared, error = _tile_distances(x, x_norms, y, y_norms)
            best = squared.topk(min(kept, squared.shape[1]), largest=False)
            values = torch.cat([values, best.values], 1)
            where = torch.cat([where, best.indices + columns.start], 1)
            best = values.topk(min(kept, values.shape[1]), largest=False)
            values, where, bound = best.values, where.gather(1, best.indices), torch.maximum(bound, error)
        # Only what lies within twice the error of the k-th can be the k-th: those get their exact distance.
        near = values.double()  # (R, kept), ascending
        i, j = ((near - near[:, wanted - 1 : wanted]).abs() <= 2 * bound).nonzero(as_tuple=True)
        near[i, j] = _exact(points.features, i + rows.start, points.features, where[i, j])
        kth = near.kthvalue(wanted, dim=1).values
        if kept < points.count:
            # Whatever was left out is no nearer than the furthest kept less the error; where that may be nearer
            # than the k-th, look at the whole row. Nothing is nearer than 0, the reach among duplicates.
            unsure = (values.double().amax(1) - bound.double().squeeze(1) < kth) & (kth > 0)
            for row in unsure.nonzero().squeeze(1).tolist():
                kth[row] = _whole_row(points, rows.start + row, wanted)
        reach.append(kth)
        bar.update()
    return torch.cat(reach)


def _whole_row(points: _Set, index: int, wanted: int) -> Tensor:
    """The ``wanted``-th smallest exact squared distance from one point to all, itself included."""
    numbers = torch.arange(points.count, device=points.features.device)
    distances = _exact(points.features, torch.full_like(numbers, index), points.features, numbers)
    return distances.kthvalue(wanted).values


def _inside(samples: _Set, reference: _Set, reach_samples: Tensor, reach_reference: Tensor, bar: tqdm):
    """Return two bool vectors: which samples (N,) the reference reaches, and which references (M,) the samples."""
    sample_in = torch.zeros(samples.count, dtype=torch.bool, device=samples.features.device)
    reference_in = torch.zeros(reference.count, dtype=torch.bool, device=samples.features.device)
    for rows, x, x_norms in samples.tiles(_ROWS):
        open_rows = []  # near ties, settled after the certain ones because those make most of them moot
        for columns, y, y_norms in reference.tiles(_COLUMNS):
            squared, error = _tile_distances(x, x_norms, y, y_norms)
            for reach, found, dim in ((reach_reference[columns][None, :], sample_in[rows], 1),
                                      (reach_samples[rows][:, None], reference_in[columns], 0)):
                slack = squared - reach.float()
                margin = error + reach.float() * 1e-6  # the reach was rounded to single precision here
                found |= (slack < -margin).any(dim)
                open_rows.append((dim, columns, (slack.abs() <= margin)))
        for dim, columns, tie in open_rows:
            found, reach = (sample_in[rows], reach_reference[columns]) if dim else (
                reference_in[columns], reach_samples[rows])
            tie &= ~(found[:, None] if dim else found[None, :])
            i, j = tie.nonzero(as_tuple=True)
            exact = _exact(samples.features, i + rows.start, reference.features, j + columns.start)
            hit = exact <= (reach[j] if dim else reach[i])
            found[(i if dim else j)[hit]] = True
        bar.update()
    return sample_in, reference_in
