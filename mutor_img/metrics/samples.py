"""The sample set of an evaluation: the images, what the sampler's manifest says of them, and what to warn about."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from mutor_img.common.errors import UserError
from mutor_img.common.files import read_json
from mutor_img.common.folders import means_split
from mutor_img.metrics.image_sets import FolderImages, NpzImages

LABELS_HASH = "labels_sha256"  # the key in a manifest of what labels_hash returns


def open_samples(path: str | os.PathLike) -> NpzImages | FolderImages:
    """Open an npz of samples (ADM's format) or a folder of PNGs as an image set.

    The set carries ``manifest``, the JSON beside the npz (``x.json`` for ``x.npz``) or in the folder
    (``manifest.json``), or None, and ``warnings``. A folder's labels are its classes', or those of ``labels.json``.

    Raises:
        UserError: whatever keeps the images from being read as they are.
    """
    path = Path(path)
    if path.is_dir() or means_split(path):
        images = FolderImages(path)
        images.manifest, images.warnings = _manifest(images.path), []
        listed = images.path / "labels.json"
        if listed.exists():
            labels = _labels(listed, len(images))
            if _contradicts(images.manifest, labels):
                raise UserError(f"{listed}: damaged, or changed by hand (it does not fit {LABELS_HASH} in "
                                f"{manifest_of(path).name}); make the samples again, or remove it to score without "
                                "labels")
            if images.labels is not None and not np.array_equal(labels, images.labels):
                raise UserError(f"{listed}: its labels differ from those of the class folders beside it; remove the "
                                "file, or put the images into one folder")
            images.labels = labels
        return images
    if not path.exists():
        raise UserError(f"{path}: no such file or folder of samples; check the path")
    images = NpzImages(path)
    images.warnings = []
    if "mu" in images.members:
        images.warnings.append(f"{path} holds statistics (mu) beside its samples; they are ignored, and the images "
                               "scored")
    images.manifest = _manifest(path)
    if _contradicts(images.manifest, images.labels):
        raise UserError(f"{manifest_of(path)}: is not of {path.name} (its labels do not fit {LABELS_HASH}); remove "
                        "it, or make the samples again")
    return images


def _manifest(path: Path) -> Any:
    """Return what the manifest of a sample set holds; None: there is none."""
    beside = manifest_of(path)
    return read_json(beside) if beside.exists() else None


def _contradicts(manifest: Any, labels: np.ndarray | None) -> bool:
    """Whether a manifest says that the labels (N,) int64, or None, are others."""
    wanted = manifest.get(LABELS_HASH) if isinstance(manifest, dict) else None
    return wanted is not None and (labels is None or wanted != labels_hash(labels))


def manifest_of(path: str | os.PathLike) -> Path:
    """Return where the manifest of a sample set stands, if it has one: ``x.json`` of ``x.npz``, or in the folder."""
    path = Path(path)
    return path / "manifest.json" if path.is_dir() else path.with_suffix(".json")


def _labels(path: Path, count: int) -> np.ndarray:
    """Return the labels (count,) int64 that ``sample.py`` wrote beside a folder's PNGs."""
    labels = read_json(path)
    if not isinstance(labels, list) or len(labels) != count or not all(
            type(label) is int and abs(label) < 2**62 for label in labels):
        raise UserError(f"{path}: must be a list of one whole number for each of the {count} images in the folder; "
                        "remove the file to score without labels, or make the samples again")
    return np.array(labels, np.int64)


def labels_hash(labels: np.ndarray) -> str:
    """Return the sha256 of the labels (N,) int64 of a sample set, in the order of its images."""
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


def label_rule(samples: Any, count: int) -> str | None:
    """Say how the first ``count`` samples got their labels: the manifest's word, else what the labels show.

    Fifty per class instead of random labels lowers FID by 0.1-0.15, so that a score must say which it was.
    """
    manifest = getattr(samples, "manifest", None)
    if isinstance(manifest, dict) and isinstance(manifest.get("labels"), str):
        return manifest["labels"]
    labels = getattr(samples, "labels", None)
    if labels is None:
        return None
    counts = np.unique(np.asarray(labels)[:count], return_counts=True)[1]
    return "balanced (seen in the labels)" if counts.min() == counts.max() else "unequal (seen in the labels)"


def class_sorted(samples: Any, count: int) -> bool:
    """Whether the first ``count`` samples lie in class order, which ruins an Inception Score in file order."""
    labels = getattr(samples, "labels", None)
    if labels is None:
        return False
    labels = np.asarray(labels)[:count]
    return bool(len(labels) > 2 and labels[0] != labels[-1] and np.all(np.diff(labels) >= 0))
