"""Score a sample set against a reference: one pass over the images for all the metrics asked for.

Knows image sets, a feature network and a reference; nothing of what made the images. The command, a training run
and a study all come through :func:`evaluate`.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from mutor_img.errors import UserError, check_range, suggest
from mutor_img.metrics.extraction import Features, extract
from mutor_img.metrics.features import FeatureNetwork
from mutor_img.metrics.frechet import frechet_distance
from mutor_img.metrics.image_sets import ImageSet, read_all
from mutor_img.metrics.inception_score import ORDERS, inception_score
from mutor_img.metrics.memorisation import Repetition
from mutor_img.metrics.precision_recall import precision_recall
from mutor_img.metrics.references import Reference, as_reference, check_role, save_reference
from mutor_img.metrics.samples import class_sorted, label_rule
from mutor_img.metrics.subsets import choose, match

METRICS = ("fid", "sfid", "is", "pr")
REFERENCE_ROWS = 10_000  # reference images for precision and recall, as many as ADM's
INCEPTION = "inception-v3-compat"


def evaluate(
    samples: ImageSet,
    reference: Reference | ImageSet,
    network: FeatureNetwork,
    *,
    metrics: Sequence[str] | None = None,
    num_samples: int | None = None,
    held_out: ImageSet | None = None,
    role: str = "generation",
    force_role: bool = False,
    is_order: str = "shuffle",
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, Any]:
    """Return the scores and everything a reader needs to trust them, as plain numbers and texts for a JSON file.

    Args:
        samples: (B, H, W, C) uint8 batches whose ``len`` is the number of images; see :mod:`image_sets`.
        reference: from :func:`open_reference`, or an image set. What is computed of it stays with the object, so
            that a second evaluation against it costs nothing.
        network: the feature network.
        metrics: some of "fid", "sfid", "is", "pr"; None for all that the network and the reference allow.
        num_samples: how many to score, from the first on; None for all.
        held_out: real images that are not in the reference: they, and as many samples of the same classes, get
            the same scores.
        role: "generation" or "reconstruction"; a reference for the other one is refused.
        force_role: go on against a reference of the other role, with a warning.
        is_order: "shuffle" or "file", see :func:`inception_score`.
        seed: of the shuffle and of the subsets.
        batch_size: images a process at once.
        progress: bars with an ETA, on a terminal.

    Under torch.distributed every process calls this alike; ranks other than 0 get an empty dictionary.

    Raises:
        UserError: what the user can mend, see the modules of the single metrics.
    """
    begin = time.perf_counter()
    reference = as_reference(reference)
    doubts = [*network.warnings, *check_role(reference, role, force_role)]
    notes = list(getattr(samples, "warnings", []))
    metrics = _resolve(metrics, reference, network)
    if is_order not in ORDERS:
        raise UserError(f"unknown Inception Score order {is_order!r}{suggest(is_order, ORDERS)}")
    count = _count(samples, num_samples, notes)
    if is_order == "file" and "is" in metrics and class_sorted(samples, count):
        notes.append("the samples lie in class order and are scored in file order: the Inception Score is far too low")
    options = {"batch_size": batch_size, "progress": progress}
    outputs = _outputs(metrics)
    rows = outputs if held_out is not None else outputs & ({"pool", "logits"} if "pr" in metrics else {"logits"})
    rows = rows | ({"logits"} if _is_classifier(network) else set())  # a subset for held-out images needs every row
    options |= {"statistics": outputs - {"logits"}, "rows": rows}
    found = extract(samples, network, count=count, title="samples", **options)
    known = _reference_features(reference, network, metrics, seed, batch_size, progress)
    real = None if held_out is None else extract(held_out, network, title="held-out", **options)
    if found is None:
        return {}
    behind = reference.pool.count if reference.pool else known.count
    for what, n in (("samples", count), ("reference images", behind)):
        if n and n < network.dimensions["pool"]:
            doubts.append(f"{n} {what} are fewer than the {network.dimensions['pool']} features: their covariance is "
                          "singular and the scores are not comparable with published ones")
    judge = _Judge(reference, network, known, metrics, held_out, is_order=is_order, seed=seed, progress=progress)
    pixels, labels = judge.pixels(samples, count), getattr(samples, "labels", None)
    everything = torch.arange(count)
    result = judge.scores(found, pixels, labels, everything)
    if real is not None:
        ours, theirs = match(count, labels, real.count, getattr(held_out, "labels", None), seed)
        result["samples_at_same_n"] = judge.scores(found.subset(ours), pixels, labels, ours)
        result["real_against_real"] = {"name": getattr(held_out, "name", "memory")} | judge.scores(
            real.subset(theirs), judge.pixels(held_out, real.count), getattr(held_out, "labels", None), theirs)
    return result | _provenance(samples, reference, network, known) | {
        "comparable": not doubts,
        "is_order": f"shuffle, seed {seed}" if is_order == "shuffle" else "file",
        "labels": label_rule(samples, count),
        "role": role,
        "warnings": doubts + notes,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def make_reference(source: Reference, network: FeatureNetwork, role: str, out, *, batch_size: int = 64,
                   progress: bool = False, seed: int = 0) -> Reference | None:
    """Write the statistics of ``source`` and the features of up to 10 000 of its images to ``out``.

    Returns the source (None on ranks other than 0). Raises UserError where the source holds no images.
    """
    if source.images is None:
        raise UserError(f"{source.name} holds no images; a reference for all metrics is made from images")
    metrics = [name for name in METRICS if _lack(name, source, network) is None]
    known = _reference_features(source, network, metrics, seed, batch_size, progress)
    if known is None:
        return None
    save_reference(out, role=role, name=source.name, source_hash=source.sha256, network=network.name,
                   weights_hash=network.weights_hash, pool=known.statistics["pool"],
                   spatial=known.statistics.get("spatial"), pool_features=known.rows["pool"])
    return source


def frechet_key(network: FeatureNetwork) -> str:
    """The result's key: only Inception's Frechet distance is called FID."""
    return "fid" if network.name == INCEPTION else "fd"


class _Judge:
    """The scores of one set of features, so that samples, their subset and held-out images are treated alike."""

    def __init__(self, reference: Reference, network: FeatureNetwork, known: Features, metrics: Sequence[str],
                 held_out: ImageSet | None, **options):
        self.network, self.known, self.metrics, self.options = network, known, metrics, options
        self.classifier = _is_classifier(network)
        self.repetition = None
        if self.classifier and reference.images is not None:
            self.repetition = Repetition(read_all(reference.images), reference.labels,
                                         None if held_out is None else read_all(held_out))

    def pixels(self, images: ImageSet, count: int) -> np.ndarray | None:
        """The images in memory, where a score needs them."""
        return read_all(images, count) if self.repetition else None

    def scores(self, found: Features, pixels: np.ndarray | None, labels: Any, chosen: torch.Tensor) -> dict[str, Any]:
        """Scores of the images number ``chosen`` (n,), whose features are ``found``."""
        result: dict[str, Any] = {}
        for metric, key, output in (("fid", frechet_key(self.network), "pool"), ("sfid", "sfid", "spatial")):
            if metric in self.metrics:
                result[key] = frechet_distance(found.statistics[output], self.known.statistics[output])
        if "is" in self.metrics:
            result["is"] = inception_score(
                found.rows["logits"], order=self.options["is_order"], seed=self.options["seed"])
        if "pr" in self.metrics:
            device = self.network.device
            result["precision"], result["recall"] = precision_recall(
                found.rows["pool"].to(device), self.known.rows["pool"].to(device), progress=self.options["progress"])
        result["num_samples"] = found.count
        if self.classifier and labels is not None:
            asked = torch.as_tensor(labels)[chosen]
            result["recognised"] = (found.rows["logits"].argmax(1) == asked).double().mean().item()
        if self.repetition:
            result |= self.repetition.scores(pixels[chosen.numpy()])
        return result


def _is_classifier(network: FeatureNetwork) -> bool:
    """Whether the network's classes are those the samples were asked for, and its images small enough to compare."""
    return bool(getattr(network, "class_names", None))


def _lack(metric: str, reference: Reference, network: FeatureNetwork) -> str | None:
    """Say what a metric lacks, or None."""
    if metric == "sfid" and "spatial" not in network.dimensions:
        return f"the network {network.name} has no spatial features"
    if metric == "sfid" and reference.spatial is None and (reference.pool is not None or reference.images is None):
        return f"the reference {reference.name} holds no spatial statistics (mu_s, sigma_s)"
    if metric == "pr" and reference.pool_features is None and reference.images is None:
        return f"the reference {reference.name} holds statistics only, no images"
    return None


def _resolve(metrics: Sequence[str] | None, reference: Reference, network: FeatureNetwork) -> list[str]:
    """Check the metrics asked for, or choose all there can be; in the order of METRICS."""
    made_by = (reference.network, reference.weights_hash)
    if reference.network is not None and made_by != (network.name, network.weights_hash):
        raise UserError(f"the reference {reference.name} was made with {reference.network} "
                        f"({reference.weights_hash[:8]}), the samples are scored with {network.name} "
                        f"({network.weights_hash[:8]}); make the reference again")
    if metrics is None:
        return [name for name in METRICS if _lack(name, reference, network) is None]
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}{suggest(name, METRICS)}")
        if lack := _lack(name, reference, network):
            raise UserError(f"the metric {name} cannot be computed: {lack}")
    if not metrics:
        raise UserError(f"no metric asked for; choose from {', '.join(METRICS)}")
    return [name for name in METRICS if name in metrics]


def _count(samples: ImageSet, wanted: int | None, notes: list[str]) -> int:
    """How many samples are scored; fewer than asked for is an error."""
    held, name = len(samples), getattr(samples, "name", "memory")
    if wanted is None:
        return held
    check_range("num-samples", wanted, 2, float("inf"))
    if held < wanted:
        raise UserError(f"{name} holds {held} samples, {wanted} are asked for; sample more, or lower --num-samples")
    if held > wanted:
        notes.append(f"the first {wanted} of the {held} samples are scored")
    return wanted


def _outputs(metrics: Sequence[str]) -> set[str]:
    """The network's outputs that the metrics need."""
    needs = {"fid": "pool", "sfid": "spatial", "is": "logits", "pr": "pool"}
    return {needs[name] for name in metrics}


def _reference_features(reference: Reference, network: FeatureNetwork, metrics: Sequence[str], seed: int,
                        batch_size: int, progress: bool) -> Features | None:
    """Return the reference's statistics, its file's where it holds any, and its rows for precision and recall.

    ``count`` is the number of images that statistics were computed from here, 0 where the file holds them.
    """
    outputs = _outputs(metrics) - {"logits"}
    statistics = {name: given for name, given in (("pool", reference.pool), ("spatial", reference.spatial))
                  if given is not None and name in outputs}
    missing = outputs - set(statistics)
    rows = {} if reference.pool_features is None else {"pool": reference.pool_features}
    need_rows = "pr" in metrics and not rows
    done = None
    if missing or need_rows:
        key = (network.name, network.weights_hash, frozenset(missing), need_rows)
        if key not in reference.computed:
            reference.computed[key] = extract(
                reference.images, network, statistics=missing, rows={"pool"} if need_rows else set(),
                batch_size=batch_size, progress=progress, title="reference")
        done = reference.computed[key]
        if done is None:
            return None
        statistics |= done.statistics
        if need_rows:
            rows["pool"] = done.rows["pool"][choose(done.count, min(done.count, REFERENCE_ROWS), seed)]
    return Features(done.count if missing else 0, statistics, rows)


def _provenance(samples: ImageSet, reference: Reference, network: FeatureNetwork, known: Features) -> dict[str, Any]:
    """What was scored against what, by which code."""
    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    versions = {name: installed(name) for name in ("mutor_img", "torch", "torch-fidelity", "numpy", "scipy")}
    statistics = f"computed from all {known.count} images" if known.count else "mu and sigma of the file"
    return {
        "features": network.name,
        "weights_sha256": network.weights_hash,
        "reference": {"name": reference.name, "kind": reference.kind, "sha256": reference.sha256,
                      "role": reference.role, "statistics": statistics,
                      "precision_recall_images": len(known.rows.get("pool", ()))},
        "samples": {"name": getattr(samples, "name", "memory"), "held": len(samples),
                    "manifest": getattr(samples, "manifest", None)},
        "versions": {"python": platform.python_version(), **versions},
    }
