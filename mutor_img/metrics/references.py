"""Reference sets: what samples are measured against, and for which kind of evaluation it is meant.

A score against the wrong set is wrong by whole points and looks right, so that a reference has a role:
"generation" (statistics of the training set) or "reconstruction" (the images that were reconstructed). Our own
statistics files carry it. ADM's published files do not, but have a layout of their own (``mu``, ``sigma``,
``mu_s``, ``sigma_s`` and the images ``arr_0``) that has only been published for training sets: that layout counts
as a declaration of "generation". Anything else has no declared role.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mutor_img.common.arrays import write_npz
from mutor_img.common.errors import UserError, check_choice
from mutor_img.common.files import file_hash, parse_json, write_atomic
from mutor_img.common.folders import means_split
from mutor_img.metrics.frechet import Statistics
from mutor_img.metrics.image_sets import (
    FolderImages,
    ImageSet,
    NpzImages,
    content,
    listing,
    npz_members,
    read_npz_array,
)

ROLES = ("generation", "reconstruction")
_ADM = {"mu", "sigma", "mu_s", "sigma_s", "arr_0"}
_ABOUT = "about"  # the member of our own files that holds their JSON


@dataclass
class Reference:
    """A reference set.

    Attributes:
        name: for the result.
        kind: "adm", "statistics", "mutor_img", "images" (npz or memory) or "folder".
        digest: sha256 of the file; None for a folder, whose :attr:`sha256` is made when it is asked for, and in memory.
        role: "generation", "reconstruction" or None where nothing declares it.
        pool, spatial: statistics the file holds, or None.
        pool_features: (M, D) float32 features the file holds for precision and recall, or None.
        images: the image set, or None in a file of statistics only.
        network, weights_hash: what made the statistics, where the file says.
        stored_size: (H, W) of the images behind the statistics, where the file says.
        computed: features of ``images`` already computed, one entry per network; filled by the evaluator.
    """

    name: str
    kind: str
    digest: str | None = None
    role: str | None = None
    pool: Statistics | None = None
    spatial: Statistics | None = None
    pool_features: Tensor | None = None
    images: ImageSet | None = None
    network: str | None = None
    weights_hash: str | None = None
    stored_size: tuple[int, int] | None = None
    computed: dict = field(default_factory=dict, repr=False)

    @property
    def labels(self) -> np.ndarray | None:
        """(N,) int64 class numbers of the images, or None."""
        return getattr(self.images, "labels", None)

    @property
    def sha256(self) -> str | None:
        """Of the file, or over all files of the folder; None in memory."""
        if self.digest is None and isinstance(self.images, FolderImages):
            self.digest = self.images.sha256()  # reads every file: rank 0 alone does, where the result is written
        return self.digest

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of the images in pixels, or None where that is not known."""
        return self.stored_size if self.images is None else getattr(self.images, "size", None)


def open_reference(path: str | os.PathLike, split: str | None = None) -> Reference:
    """Open a reference: our statistics file, ADM's npz, ``mu`` and ``sigma`` alone, or images (npz or PNG folder).

    Args:
        path: the file or folder.
        split: of a folder, the split to take where names tell several.

    Raises:
        UserError: none of these, or one that cannot be read.
    """
    path = Path(path)
    if path.is_dir() or means_split(path):
        images = FolderImages(path, split)
        return Reference(images.name, "folder", images=images)
    if split is not None:
        raise UserError(f"--split {split}: {path} is not a folder and has no splits; leave --split out")
    if not path.exists():
        raise UserError(f"{path}: no such reference file or folder")
    members, digest = npz_members(path), file_hash(path)
    if _ABOUT in members:
        return _open_own(path, digest, members)
    images = NpzImages(path) if "arr_0" in members else None
    pool, spatial = _statistics(path, members, "mu", "sigma"), _statistics(path, members, "mu_s", "sigma_s")
    if pool is None and images is None:
        raise UserError(f"{path}: not a reference: it holds {listing(members) or 'nothing'}, but neither "
                        "mu and sigma nor images (arr_0)")
    adm = members >= _ADM
    kind = "adm" if adm else "images" if pool is None else "statistics"
    return Reference(path.name, kind, digest, "generation" if adm else None, pool, spatial, images=images)


def identity(reference: Reference) -> Any:
    """Return as a JSON value what tells a reference from another, as far as that is known without reading images."""
    return reference.digest or content(reference.images)


def as_reference(images: ImageSet | Reference, role: str | None = None) -> Reference:
    """Wrap an image set in memory as a reference; a reference is returned as it is."""
    if isinstance(images, Reference):
        return images
    return Reference(getattr(images, "name", "memory"), "images", role=role, images=images)


def check_role(reference: Reference, role: str, force: bool) -> list[str]:
    """Return the warnings of scoring an evaluation of this ``role`` against the reference.

    Raises:
        UserError: an unknown role, or the reference is made for the other one and ``force`` is not set.
    """
    check_choice("the role", role, ROLES)
    if reference.role is None:
        return [f"the reference {reference.name} does not declare its role (generation or reconstruction): scores are "
                "not comparable with published ones; evaluate_fid.py --make-reference --role writes one that does"]
    if reference.role != role:
        message = f"the reference {reference.name} is for {reference.role}, this evaluation for {role}"
        if not force:
            raise UserError(f"{message}; give the other reference, or --force-role to use it anyway")
        return [f"{message}: scores are not comparable with published ones"]
    return []


def save_reference(path: str | os.PathLike, *, role: str, name: str, source_hash: str | None, network: str,
                   weights_hash: str, pool: Statistics, spatial: Statistics | None, pool_features: Tensor,
                   size: tuple[int, int] | None = None) -> Path:
    """Write our statistics file: a plain npz with a JSON text ``about``; :func:`open_reference` reads it back.

    Arrays: ``mu`` (D,) and ``sigma`` (D, D) float64, the same with ``_s`` if there are spatial statistics, and
    ``pool`` (M, D) float32, the features for precision and recall. ``size`` is (H, W) of the images in pixels.
    """
    check_choice("the role", role, ROLES)
    about = {"format": 1, "role": role, "name": name, "count": pool.count, "features": network,
             "weights_sha256": weights_hash, "source_sha256": source_hash,
             "image_size": None if size is None else list(size)}
    arrays = {"mu": pool.mu.numpy(), "sigma": pool.sigma.numpy(), "pool": pool_features.numpy()}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mu.numpy(), "sigma_s": spatial.sigma.numpy()}
    arrays[_ABOUT] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    return write_atomic(path, lambda aside: write_npz(aside, arrays))


def _open_own(path: Path, digest: str, members: set[str]) -> Reference:
    try:
        about = parse_json(read_npz_array(path, _ABOUT).tobytes(), f"{path}: its description")
        role, name, count = about["role"], about["name"], about["count"]
        network, weights_hash = about["features"], about["weights_sha256"]
        size = None if about.get("image_size") is None else tuple(about["image_size"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: its description cannot be read ({error}); make the reference again") from None
    texts = all(isinstance(text, str) for text in (role, name, network, weights_hash))
    # The count is null where the statistics were those of a file that does not say it.
    if not texts or role not in ROLES or type(count) not in (int, type(None)) or not {"mu", "sigma", "pool"} <= members:
        raise UserError(f"{path}: not a whole statistics file; make the reference again")
    rows = torch.from_numpy(read_npz_array(path, "pool"))
    if rows.dtype != torch.float32 or rows.ndim != 2 or not torch.isfinite(rows).all():
        raise UserError(f"{path}: pool is {rows.dtype} {tuple(rows.shape)}, not finite float32 features of images; "
                        "make the reference again")
    return Reference(
        name, "mutor_img", digest, role, _statistics(path, members, "mu", "sigma", count),
        _statistics(path, members, "mu_s", "sigma_s", count), rows, network=network, weights_hash=weights_hash,
        stored_size=size)


def _statistics(path: Path, members: set[str], mean: str, covariance: str, count: int | None = None):
    if not {mean, covariance} <= members:
        if {mean, covariance} & members:
            raise UserError(f"{path}: {mean} and {covariance} belong together; one is missing")
        return None
    mu, sigma = read_npz_array(path, mean), read_npz_array(path, covariance)
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f" or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{path}: {mean} is {mu.dtype} {mu.shape} and {covariance} {sigma.dtype} {sigma.shape}; "
                        "expected a mean (D,) and a covariance (D, D)")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: {mean} or {covariance} holds NaN or infinity; make or download the file again")
    return Statistics(torch.from_numpy(mu).double(), torch.from_numpy(sigma).double(), count)
