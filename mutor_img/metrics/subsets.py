"""Equal numbers for a fair comparison: seeded subsets of images."""

from __future__ import annotations

from typing import Any

import torch

from mutor_img.common.errors import UserError
from mutor_img.common.streams import Stream, bits


def choose(count: int, size: int, seed: int) -> torch.Tensor:
    """Return ``size`` of ``count`` numbers, ascending (size,) int64: all, or a draw from the seed."""
    draws = bits(seed, Stream.ORDER, count, torch.arange(count))
    return torch.argsort(draws)[:size].sort().values


def match(count: int, labels: Any, real_count: int, real_labels: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return numbers of samples and of held-out images: as many of each, and as many of each class if both have labels.

    The Frechet distance falls with N and with every class that comes closer to its share, so that 500 samples with
    random labels would look worse than 500 balanced real images for no fault of their own.
    """
    if labels is None or real_labels is None:
        size = min(count, real_count)
        return choose(count, size, seed), choose(real_count, size, seed)
    sides = [torch.as_tensor(labels)[:count], torch.as_tensor(real_labels)]
    chosen: list[list[torch.Tensor]] = [[], []]
    for index in sides[1].unique().tolist():
        members = [(side == index).nonzero().squeeze(1) for side in sides]
        size = min(len(one) for one in members)
        for numbers, one in zip(chosen, members):
            numbers.append(one[choose(len(one), size, seed)])
    ours, theirs = (torch.cat(numbers).sort().values for numbers in chosen)
    if len(ours) < 2:
        raise UserError(f"only {len(ours)} of the samples and of the held-out images have class labels in common; give "
                        "at least 2")
    return ours, theirs
