"""What a result says of itself: what was scored against what, by which code."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mutor_img.metrics.extraction import Features
from mutor_img.metrics.features import FeatureNetwork
from mutor_img.metrics.references import Reference

_PACKAGES = ("mutor_img", "torch", "torch-fidelity", "timm", "numpy", "scipy")


def provenance(samples: Any, reference: Reference, network: FeatureNetwork, known: Features,
               held: int) -> dict[str, Any]:
    """Return the part of a result that describes samples, reference, network and versions, as JSON values.

    Args:
        samples: the image set.
        reference: its reference.
        network: the feature network.
        known: the reference's features; ``count`` is the number of images that its statistics were computed from
            here, 0 where a file holds them or none are needed.
        held: samples in the whole set, of which perhaps a part is scored.
    """
    statistics = (f"computed from all {known.count} images" if known.count
                  else "mu and sigma of the file" if known.statistics else "none needed")
    rows = next(iter(known.rows.values()), ())
    return {
        "features": network.name,
        "weights_sha256": network.weights_hash,
        "reference": {"name": reference.name, "kind": reference.kind, "sha256": reference.sha256,
                      "role": reference.role, "statistics": statistics, "precision_recall_images": len(rows)},
        "samples": {"name": getattr(samples, "name", "memory"), "held": held,
                    "resize": getattr(samples, "resize", None), "manifest": getattr(samples, "manifest", None)},
        "versions": {"python": platform.python_version(), **{name: _installed(name) for name in _PACKAGES}},
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
