"""Inception Score under ADM's rule: chunks of 5000 images, their mean.

Source: Salimans et al. 2016; the chunk rule is that of the ADM evaluator (Dhariwal and Nichol 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mutor_img.common.errors import UserError, check_choice
from mutor_img.common.streams import Stream, bits

CHUNK = 5000
ORDERS = ("shuffle", "file")


def inception_score(logits: Tensor, *, order: str = "shuffle", seed: int = 0, chunk: int = CHUNK) -> float:
    """Return the mean over chunks of exp(mean KL(p(y | x) || p(y of the chunk))); between 1 and the class count.

    The score of a chunk depends on which images share it: in class order 50 000 ImageNet samples lose three
    quarters of it. ``order="shuffle"`` deals the images by a permutation drawn from ``seed``; ``"file"`` is ADM's
    literal rule. A last chunk that is short counts as a whole one, as ADM's does.

    Args:
        logits: (N, classes), any float dtype, without the classifier's bias for the Inception network.
        order: "shuffle" or "file".
        seed: of the shuffle.
        chunk: images per chunk.

    Raises:
        UserError: no images, an unknown order, or NaN logits.
    """
    check_choice("the Inception Score's order", order, ORDERS)
    count = logits.shape[0]
    if count == 0:
        raise UserError("the Inception Score needs at least 1 image")
    if not torch.isfinite(logits).all():
        raise UserError("the classifier's outputs hold NaN or infinity; look at the images and at the weights")
    if order == "shuffle":
        draws = bits(seed, Stream.IS_ORDER, torch.arange(count))  # (N,)
        logits = logits[torch.argsort(draws).to(logits.device)]
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric  # seconds to import

    scores = [isc_features_to_metric(part, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]
              for part in logits.split(chunk)]
    return float(sum(scores) / len(scores))
