"""The feature networks by name."""

from __future__ import annotations

from pathlib import Path

import torch

from mutor_img.common.errors import UserError, suggest
from mutor_img.metrics.digits import DEFAULT_FOLDER, load_digits
from mutor_img.metrics.features import FeatureNetwork

PREFIX = "timm:"
FEATURES = ("inception", "mnist", "classifier")


def check_features(features: str, weights: str | None) -> None:
    """Raise :class:`UserError` for an unknown network, or one whose weights must be named and are not."""
    if features not in FEATURES and not features.startswith(PREFIX):
        raise UserError(f"--features {features!r} is unknown{suggest(features, (*FEATURES, PREFIX + 'NAME'))}")
    if features == "classifier" and not weights:
        raise UserError("--features classifier needs --features-weights FOLDER, that of a classifier trained with "
                        "python -m mutor_img.metrics.digits")
    if features.startswith(PREFIX) and not weights:
        raise UserError(f"--features {features} needs --features-weights FILE, its weights; nothing is downloaded")


def load_features(features: str, weights: str | Path | None, device: torch.device) -> FeatureNetwork:
    """Load a feature network onto ``device``; Inception's weights may be downloaded.

    Args:
        features: ``inception``, ``mnist``, ``classifier`` or ``timm:NAME``.
        weights: folder of the classifier, or the timm model's or Inception's file; None: where they are by default.
        device: where it runs.

    Raises:
        UserError: as the loader of that network.
    """
    if features in ("mnist", "classifier"):
        return load_digits(weights or DEFAULT_FOLDER, device, features)
    if features.startswith(PREFIX):
        from mutor_img.metrics.timm_features import load_timm  # seconds to import, as the next

        return load_timm(features, weights, device)
    from mutor_img.metrics.inception import load_inception

    return load_inception(weights, device)
