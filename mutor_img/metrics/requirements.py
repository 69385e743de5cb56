"""Which scores there are, and whether samples, reference and network can give them: asked before the long pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mutor_img.common.errors import UserError, check_choice
from mutor_img.metrics.features import FeatureNetwork
from mutor_img.metrics.references import Reference

METRICS = ("fid", "sfid", "is", "pr")  # what is scored unless the user chooses
OPTIONAL = ("kid",)
KNOWN = (*METRICS, *OPTIONAL)
SCORES = {"fid": "FID", "fd": "FD", "sfid": "sFID", "is": "IS", "precision": "precision", "recall": "recall",
          "kid": "KID", "kd": "KD", "recognised": "recognised", "distinct": "distinct"}  # names by the keys of a result
INCEPTION = "inception-v3-compat"
FEATURES_OF_INCEPTION = 2048
_NEEDS = {"fid": "pool", "sfid": "spatial", "is": "logits", "pr": "pool", "kid": "pool"}  # network outputs
_BY_ROW = {"is", "pr", "kid"}  # scores of the features of single images, not of their moments


def frechet_key(network: FeatureNetwork) -> str:
    """The result's key: only Inception's Frechet distance is called FID."""
    return "fid" if network.name == INCEPTION else "fd"


def kernel_key(network: FeatureNetwork) -> str:
    """The result's key: only Inception's kernel distance is called KID."""
    return "kid" if network.name == INCEPTION else "kd"


def check_names(names: Sequence[str]) -> None:
    """Raise :class:`UserError` for a metric that does not exist, or for none at all."""
    for name in names:
        check_choice("a metric", name, KNOWN)
    if not names:
        raise UserError(f"no metric is given; choose from {', '.join(KNOWN)}")


def moment_outputs(metrics: Sequence[str]) -> set[str]:
    """Return the network outputs whose mean and covariance the metrics need."""
    return {_NEEDS[name] for name in metrics if name not in _BY_ROW}


def row_outputs(metrics: Sequence[str]) -> set[str]:
    """Return the network outputs that the metrics need image by image."""
    return {_NEEDS[name] for name in metrics if name in _BY_ROW}


def lack(metric: str, reference: Reference, network: FeatureNetwork) -> str | None:
    """Say what a metric lacks, or None."""
    output = _NEEDS[metric]
    if output not in network.dimensions:
        what = {"spatial": "spatial features", "logits": "classes"}[output]
        return f"the network {network.name} has no {what}"
    if metric == "sfid" and reference.spatial is None and (reference.pool is not None or reference.images is None):
        return f"the reference {reference.name} holds no spatial statistics (mu_s, sigma_s)"
    if metric == "fid" and reference.pool is None and reference.images is None:
        return f"the reference {reference.name} holds neither statistics (mu, sigma) nor images"
    if metric in ("pr", "kid") and reference.pool_features is None and reference.images is None:
        return f"the reference {reference.name} holds statistics only, no images"
    return None


def resolve(metrics: Sequence[str] | None, reference: Reference, network: FeatureNetwork) -> list[str]:
    """Check the metrics asked for, or choose all there can be; in the order of ``KNOWN``.

    Raises:
        UserError: an unknown metric, one that cannot be computed, or a reference made with another network.
    """
    if metrics is not None:
        check_names(metrics)
    _check_network(reference, network, metrics is None or bool(moment_outputs(metrics)))
    if metrics is None:
        return [name for name in METRICS if lack(name, reference, network) is None]
    for name in metrics:
        if missing := lack(name, reference, network):
            raise UserError(f"the metric {name} cannot be computed: {missing}")
    return [name for name in KNOWN if name in metrics]


def _check_network(reference: Reference, network: FeatureNetwork, uses_moments: bool) -> None:
    made_by = (reference.network, reference.weights_hash)
    if reference.network is not None and made_by != (network.name, network.weights_hash):
        raise UserError(f"the reference {reference.name} was made with {reference.network} "
                        f"({reference.weights_hash[:8]}), the samples are scored with {network.name} "
                        f"({network.weights_hash[:8]}); make the reference again")
    if (uses_moments and reference.network is None and reference.pool is not None and network.name != INCEPTION
            and len(reference.pool.mu) == FEATURES_OF_INCEPTION):
        raise UserError(f"the reference {reference.name} does not name its network, and statistics of "
                        f"{FEATURES_OF_INCEPTION} features are taken for Inception's; the samples are scored with "
                        f"{network.name}: make a reference of images with evaluate_fid.py --make-reference, or score "
                        "with --features inception")
    for output, given in (("pool", reference.pool), ("spatial", reference.spatial)):
        dimension = network.dimensions.get(output)
        if given is not None and dimension is not None and len(given.mu) != dimension:
            raise UserError(f"the reference {reference.name} holds statistics of {len(given.mu)} features, the network "
                            f"{network.name} has {dimension}; give a reference made with this network")


def class_doubts(sets: dict[str, Any]) -> list[str]:
    """Return a warning where labels are compared that do not mean the same classes, one for each set.

    Args:
        sets: what has labels, by what a message calls it. Its names are those of its manifest, of its class folders, or
            of a classifier's training; one without names is passed over.
    """
    named = {what: names for what, one in sets.items() if (names := _class_names(one))}
    doubts: list[str] = []
    for what, names in list(named.items())[1:]:
        first, known = next(iter(named.items()))
        if len(names) != len(known):
            doubts.append(f"the {first} have {len(known)} classes and the {what} {len(names)}: their labels are not "
                          "numbered alike, but scores per class compare them anyway")
        elif names != known and _are_ids(names) == _are_ids(known):  # words for ids would be no other classes
            label = next(i for i, (a, b) in enumerate(zip(known, names)) if a != b)
            doubts.append(f"class {label} is {known[label]!r} in the {first} and {names[label]!r} in the {what}: "
                          "scores per class compare them anyway")
    return doubts


def _are_ids(names: Sequence[str]) -> bool:
    return any(re.fullmatch(r"n\d{8}", name) for name in names)


def _class_names(one: Any) -> list[str] | None:
    manifest = getattr(one, "manifest", None)
    written = manifest.get("class_names") if isinstance(manifest, dict) else None
    return written if isinstance(written, list) else getattr(one, "class_names", None)


def check_size(samples: Any, reference: Reference, what: str = "samples") -> None:
    """Raise :class:`UserError` where samples and reference are known to be of different sizes in pixels."""
    ours, theirs = getattr(samples, "size", None), reference.size
    if ours is not None and theirs is not None and tuple(ours) != tuple(theirs):
        raise UserError(f"the {what} are {ours[1]} x {ours[0]} pixels, the reference {reference.name} {theirs[1]} x "
                        f"{theirs[0]}; scores compare images of one size: resize, or give a reference of that size")
