"""The feature networks by name."""

from __future__ import annotations

from pathlib import Path

import torch

from mutor_img.common.errors import UserError, suggest
from mutor_img.metrics.digits import DEFAULT_FOLDER, load_digits
from mutor_img.metrics.features import FeatureNetwork

PREFIX = "timm:"
FEATURES = ("inception", "mnist", "classifier")


def check_features(features: str, weights: str | None, inception_weights: str | None = None) -> None:
    """Raise :class:`UserError` for an unknown network, or weights that are not for it."""
    if features not in FEATURES and not features.startswith(PREFIX):
        raise UserError(f"--features {features!r} is unknown{suggest(features, (*FEATURES, PREFIX + 'NAME'))}")
    if weights and features == "inception":
        raise UserError("--features-weights is for --features mnist, classifier and timm:NAME; Inception's file is "
                        "given by --inception-weights")
    if inception_weights and features != "inception":
        raise UserError(f"--inception-weights has no use with --features {features}")
    if features == "classifier" and not weights:
        raise UserError("--features classifier needs --features-weights FOLDER, that of a classifier trained with "
                        "python -m mutor_img.metrics.digits")
    if features.startswith(PREFIX) and not weights:
        raise UserError(f"--features {features} needs --features-weights FILE, its weights; nothing is downloaded")


def load_features(features: str, weights: str | Path | None, inception_weights: str | Path | None,
                  device: torch.device) -> FeatureNetwork:
    """Load a feature network onto ``device``; Inception's weights may be downloaded.

    Args:
        features: ``inception``, ``mnist``, ``classifier`` or ``timm:NAME``.
        weights: folder of the classifier, or the timm model's file.
        inception_weights: Inception's file, where it is not in torch's hub folder.
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

    return load_inception(inception_weights, device)
