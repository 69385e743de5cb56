"""Does a generator invent, or does it repeat? Distinct samples, and distances to the nearest training image.

Distances are L2 over grey pixels in [0, 1]. They see a copy that the tokenizer has blurred a little, and not one
that is shifted; they suit small aligned images such as digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mutor_img.common.errors import UserError
from mutor_img.common.full_precision import full_precision

_ROWS = 2048


def distinct_share(images: np.ndarray) -> float:
    """Return the number of different images of (N, H, W, C) uint8 over N; one byte of difference is enough."""
    return len({image.tobytes() for image in images}) / len(images)


def grey_rows(images: np.ndarray) -> Tensor:
    """Return (N, H, W, C) uint8 images as (N, H*W) float32 grey pixels in [0, 1]."""
    return torch.from_numpy(images.mean(3, dtype=np.float32) / 255).flatten(1)


@full_precision()
def nearest(rows: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Return the L2 distance (N,) from each row to its nearest training row, and that row's number (N,) int64."""
    norms = training.square().sum(1)  # (M,)
    where = torch.cat([(norms - 2 * part @ training.T).argmin(1) for part in rows.split(_ROWS)])
    # The product only ranks; the distance itself comes from the differences, so that a copy is at 0 exactly.
    distance = torch.cat([(a - training[i]).norm(dim=1) for a, i in zip(rows.split(_ROWS), where.split(_ROWS))])
    return distance, where


@dataclass(frozen=True)
class CopyRule:
    """A sample is a copy if it is nearer to a training image than any held-out image is, class by class.

    The class is that of the nearest training image, because a 1 lies nearer to other 1s than an 8 to other 8s. A
    fresh real image breaks such a record with a chance of 1 in (held-out images of the class + 1), so that an
    honest generator shows ``expected`` copies and not none. A class without a held-out image has the smallest
    distance of all as its limit.

    Attributes:
        limits: (classes,) distance below which a sample of the class is a copy.
        chances: (classes,) chance of a fresh real image to be below.
    """

    limits: Tensor
    chances: Tensor

    @classmethod
    def calibrate(cls, distances: Tensor, classes: Tensor, number: int) -> CopyRule:
        """From held-out images: nearest distances (H,), and the class (H,) of the nearest training image."""
        limits = torch.full((number,), float(distances.min()))
        chances = torch.full((number,), 1 / (len(distances) + 1))
        for index in classes.unique().tolist():
            own = distances[classes == index]
            limits[index], chances[index] = own.min(), 1 / (len(own) + 1)
        return cls(limits, chances)

    def copies(self, distances: Tensor, classes: Tensor) -> int:
        """Number of samples that are copies."""
        return int((distances < self.limits[classes]).sum())

    def expected(self, classes: Tensor) -> float:
        """Number of copies that as many fresh real images would show."""
        return float(self.chances[classes].sum())


class Repetition:
    """The training images to compare with, and the rule for copies that the held-out images give.

    Args:
        training: (M, H, W, C) uint8.
        labels: (M,) integer classes of the training images, or None for a single class.
        held_out: (K, H, W, C) uint8 real images that are not among them, or None: then copies are not counted.

    Raises:
        UserError: held-out images of another size.
    """

    def __init__(self, training: np.ndarray, labels: np.ndarray | None, held_out: np.ndarray | None):
        self.size = training.shape[1:3]
        self.training = grey_rows(training)  # (M, H*W)
        self.classes = torch.zeros(len(training), dtype=torch.int64) if labels is None else torch.as_tensor(labels)
        self.rule = None
        if held_out is not None:
            distances, where = self._nearest(held_out)
            self.rule = CopyRule.calibrate(distances, self.classes[where], int(self.classes.max()) + 1)

    def scores(self, images: np.ndarray) -> dict[str, float | int]:
        """Return "distinct", "nearest_training_distance" and, with held-out images, "nearer_than_held_out" and
        "nearer_by_chance"."""
        distances, where = self._nearest(images)
        result = {"distinct": distinct_share(images), "nearest_training_distance": distances.mean().item()}
        if self.rule is not None:
            classes = self.classes[where]
            result["nearer_than_held_out"] = self.rule.copies(distances, classes)
            result["nearer_by_chance"] = round(self.rule.expected(classes), 1)
        return result

    def _nearest(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        if images.shape[1:3] != self.size:
            raise UserError(f"images of {images.shape[2]} x {images.shape[1]} pixels cannot be compared with training "
                            f"images of {self.size[1]} x {self.size[0]}")
        return nearest(grey_rows(images), self.training)
