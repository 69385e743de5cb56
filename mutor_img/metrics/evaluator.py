"""Score a sample set against a reference: one pass over the images for all the metrics asked for.

Knows image sets, a feature network and a reference; nothing of what made the images. The command, a training run
and a study all come through :func:`evaluate`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mutor_img.common.errors import UserError, check_choice, check_range
from mutor_img.metrics.extraction import Features, extract
from mutor_img.metrics.features import FeatureNetwork
from mutor_img.metrics.frechet import frechet_distance
from mutor_img.metrics.image_sets import ImageSet, read_all
from mutor_img.metrics.inception_score import ORDERS, inception_score
from mutor_img.metrics.kernel_distance import kernel_distance
from mutor_img.metrics.memorisation import Repetition
from mutor_img.metrics.pieces import count_pieces
from mutor_img.metrics.precision_recall import precision_recall
from mutor_img.metrics.provenance import provenance
from mutor_img.metrics.references import Reference, as_reference, check_role, save_reference
from mutor_img.metrics.requirements import (
    check_size,
    class_doubts,
    frechet_key,
    kernel_key,
    moment_outputs,
    resolve,
    row_outputs,
)
from mutor_img.metrics.samples import class_sorted, label_rule
from mutor_img.metrics.subsets import choose, match
from mutor_img.metrics.views import Subset

REFERENCE_ROWS = 10_000  # reference images for precision and recall, as many as ADM's


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
        metrics: some of "fid", "sfid", "is", "pr", "kid"; None for all but the last that network and reference allow.
        num_samples: how many to score, drawn from all of them by the seed; None for all.
        held_out: real images that are not in the reference: they, and as many samples of the same classes, get
            the same scores.
        role: "generation" or "reconstruction"; a reference for the other one is refused.
        force_role: go on against a reference of the other role, with a warning.
        is_order: "shuffle" or "file", see :func:`inception_score`.
        seed: of the shuffle and of the subsets.
        batch_size: images per process at once.
        progress: bars with an ETA.

    Under torch.distributed every process calls this alike; ranks other than 0 get an empty dictionary.

    Raises:
        UserError: what the user can fix, see the modules of the single metrics.
    """
    begin = time.perf_counter()
    reference = as_reference(reference)
    doubts = [*network.warnings, *check_sets(samples, reference, num_samples=num_samples, held_out=held_out, role=role,
                                             force_role=force_role)]
    notes = list(getattr(samples, "warnings", []))
    metrics = resolve(metrics, reference, network)
    check_choice("the Inception Score's order", is_order, ORDERS)
    held, samples = len(samples), _draw(samples, num_samples, seed, notes)
    count = len(samples)
    if is_order == "file" and "is" in metrics and class_sorted(samples, count):
        doubts.append("the samples lie in class order and are scored in file order: the Inception Score is far too low")
    if held_out is not None or getattr(network, "class_names", None):
        doubts += class_doubts({"samples": samples, "held-out images": held_out, "reference": reference.images,
                                "classifier": network})
    judge = _Judge(reference, network, metrics, is_order=is_order, seed=seed, progress=progress)
    options = {"batch_size": batch_size, "progress": progress, "pixels": judge.classifier,
               **judge.outputs(subset=held_out is not None)}
    known = _reference_features(reference, network, metrics, seed, batch_size, progress)  # first: samples take longer
    found = extract(samples, network, title="samples", **options)
    real = None if held_out is None else extract(held_out, network, title="held-out", **options)
    if found is None:
        return {}
    if moment_outputs(metrics):
        doubts += _too_few(count, reference.pool.count if reference.pool else known.count, network)
    judge.know(known, real)
    labels = getattr(samples, "labels", None)
    result = judge.scores(found, labels)
    if real is not None:
        ours, theirs = match(count, labels, real.count, getattr(held_out, "labels", None), seed)
        result["samples_at_same_n"] = judge.scores(found.subset(ours), _part(labels, ours))
        result["real_against_real"] = {"name": getattr(held_out, "name", "memory")} | judge.scores(
            real.subset(theirs), _part(getattr(held_out, "labels", None), theirs))
    return result | provenance(samples, reference, network, known, held) | {
        "comparable": not doubts,
        "subset": "all" if count == held else f"{count} of {held}, drawn by seed {seed}",
        "is_order": f"shuffle, seed {seed}" if is_order == "shuffle" else "file",
        "labels": label_rule(samples, count),
        "role": role,
        "warnings": doubts + notes,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def check_sets(samples: ImageSet, reference: Reference, *, num_samples: int | None = None,
               held_out: ImageSet | None = None, role: str = "generation", force_role: bool = False) -> list[str]:
    """Check what shows before there is a network; arguments and errors as for :func:`evaluate`.

    Returns:
        Warnings.
    """
    check_size(samples, reference)
    if held_out is not None:
        check_size(held_out, reference, "held-out images")
    held, name = len(samples), getattr(samples, "name", "memory")
    if num_samples is not None and num_samples != held:
        check_range("num-samples", num_samples, 2, float("inf"))
        if held < num_samples:
            raise UserError(f"{name} holds {held} samples, {num_samples} are asked for; sample more, or lower "
                            "--num-samples")
    return check_role(reference, role, force_role)


def check_source(source: Reference, role: str) -> None:
    """Raise :class:`UserError` where no statistics file for a role can be made of ``source``."""
    if source.images is None:
        raise UserError(f"{source.name} holds no images; a reference for all metrics is made from images")
    if source.role not in (None, role):
        raise UserError(f"{source.name} is a reference for {source.role}; give --role {source.role}, or other images")


def make_reference(source: Reference, network: FeatureNetwork, role: str, out, *, batch_size: int = 64,
                   progress: bool = False) -> Reference | None:
    """Write the statistics of ``source`` and the features of up to 10 000 of its images to ``out``.

    Returns the source (None on ranks other than 0). Raises UserError where the source holds no images, or is one for
    the other role.
    """
    check_source(source, role)
    known = _reference_features(source, network, resolve(None, source, network), 0, batch_size, progress)
    if known is None:
        return None
    save_reference(out, role=role, name=source.name, source_hash=source.sha256, network=network.name,
                   weights_hash=network.weights_hash, pool=known.statistics["pool"],
                   spatial=known.statistics.get("spatial"), pool_features=known.rows["pool"], size=source.size)
    return source


class _Judge:
    """The scores of one set of features, so that samples, their subset and held-out images are treated alike."""

    def __init__(self, reference: Reference, network: FeatureNetwork, metrics: Sequence[str], **options):
        self.reference, self.network, self.metrics, self.options = reference, network, metrics, options
        # Such a network's classes are those the samples were asked for, and its images small enough to compare.
        self.classifier = bool(getattr(network, "class_names", None))
        self.compares = self.classifier and reference.images is not None

    def outputs(self, subset: bool) -> dict[str, set[str]]:
        """Return what :func:`extract` shall keep; of a set that a subset is scored of, every row."""
        rows = moment_outputs(self.metrics) | row_outputs(self.metrics) if subset else row_outputs(self.metrics)
        return {"statistics": moment_outputs(self.metrics), "rows": rows | ({"logits"} if self.classifier else set())}

    def know(self, known: Features, real: Features | None) -> None:
        """Take the features of the reference, and of the held-out images if there are any."""
        self.known, self.repetition = known, None
        if self.compares:
            if "pixels" not in self.reference.computed:
                self.reference.computed["pixels"] = read_all(self.reference.images)
            self.repetition = Repetition(self.reference.computed["pixels"], self.reference.labels,
                                         None if real is None else real.pixels)

    def scores(self, found: Features, labels: Any) -> dict[str, Any]:
        """Scores of the images whose features are ``found``, and their labels (n,) or None."""
        result: dict[str, Any] = {}
        seed, device = self.options["seed"], self.network.device
        for metric, key, output in (("fid", frechet_key(self.network), "pool"), ("sfid", "sfid", "spatial")):
            if metric in self.metrics:
                result[key] = frechet_distance(found.statistics[output], self.known.statistics[output])
        if "is" in self.metrics:
            result["is"] = inception_score(found.rows["logits"], order=self.options["is_order"], seed=seed)
        if "pr" in self.metrics:
            result["precision"], result["recall"] = precision_recall(
                found.rows["pool"].to(device), self.known.rows["pool"].to(device), progress=self.options["progress"])
        if "kid" in self.metrics:
            result[kernel_key(self.network)] = kernel_distance(found.rows["pool"], self.known.rows["pool"], seed=seed)
        result["num_samples"] = found.count
        if self.classifier and labels is not None:
            asked = torch.as_tensor(labels)[: found.count]
            right = found.rows["logits"].argmax(1) == asked  # (n,)
            result["recognised"] = right.double().mean().item()
            result["per_class"] = _per_class(self.network.class_names, asked, right, found.pixels)
        if self.repetition:
            result |= self.repetition.scores(found.pixels)
        return result


def _per_class(names: Sequence[str], asked: torch.Tensor, right: torch.Tensor,
               images: np.ndarray) -> dict[str, dict[str, float]]:
    """Return by class name how many images there are, and the shares recognised and in more than one piece.

    Args:
        names: of the network's classes.
        asked, right: (n,) labels, and whether the network agrees.
        images: (n, H, W, C) uint8.
    """
    broken = torch.from_numpy(count_pieces(images) > 1)  # (n,)
    table = {}
    for label in asked.unique().tolist():
        own = asked == label
        table[names[label] if label < len(names) else str(label)] = {
            "num_samples": int(own.sum()), "recognised": right[own].double().mean().item(),
            "in_pieces": broken[own].double().mean().item()}
    return table


def _part(labels: Any, chosen: torch.Tensor) -> torch.Tensor | None:
    return None if labels is None else torch.as_tensor(labels)[chosen]


def _too_few(samples: int, reference: int | None, network: FeatureNetwork) -> list[str]:
    """Return a warning for each side that has fewer images than features; None: the file does not say how many."""
    size = network.dimensions["pool"]
    return [f"{n} {what} are fewer than the {size} features: their covariance is singular and the scores are not "
            "comparable with published ones"
            for what, n in (("samples", samples), ("reference images", reference)) if n and n < size]


def _draw(samples: ImageSet, wanted: int | None, seed: int, notes: list[str]) -> ImageSet:
    """Return the samples that are scored: all, or as many as are wanted, drawn by the seed from the whole set.

    The first ones of a folder or of a file in class order would be those of the first classes.
    """
    held = len(samples)
    if wanted is None or wanted == held:
        return samples
    notes.append(f"{wanted} of the {held} samples are scored, drawn from all of them by seed {seed}")
    return Subset(samples, choose(held, wanted, seed))


def _reference_features(reference: Reference, network: FeatureNetwork, metrics: Sequence[str], seed: int,
                        batch_size: int, progress: bool) -> Features | None:
    """Return the reference's statistics, its file's where it holds any, and its rows for precision and recall.

    ``count`` is the number of images that statistics were computed from here, 0 where the file holds them.
    """
    outputs = moment_outputs(metrics)
    statistics = {name: given for name, given in (("pool", reference.pool), ("spatial", reference.spatial))
                  if given is not None and name in outputs}
    missing = outputs - set(statistics)
    rows = {} if reference.pool_features is None else {"pool": reference.pool_features}
    need_rows = "pool" in row_outputs(metrics) and not rows
    done = None
    if missing or need_rows:
        key = (network.name, network.weights_hash, frozenset(missing), need_rows, seed)
        if key not in reference.computed:
            images, total = reference.images, len(reference.images)
            chosen = choose(total, min(total, REFERENCE_ROWS), seed)
            if not missing:  # only rows are needed, and the others need not be looked at
                images, chosen = Subset(images, chosen), None
            reference.computed[key] = extract(
                images, network, statistics=missing, rows={"pool"} if need_rows else set(), chosen=chosen,
                batch_size=batch_size, progress=progress, title="reference")
        done = reference.computed[key]
        if done is None:
            return None
        statistics |= done.statistics
        rows |= done.rows
    return Features(done.count if missing else 0, statistics, rows)
