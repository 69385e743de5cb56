"""The scores of reconstructions, gathered batch by batch: pixels, codes, and what two borrowed networks see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mutor_img.common.errors import UserError, check_choice
from mutor_img.metrics.features import FeatureNetwork
from mutor_img.metrics.frechet import Moments, frechet_distance
from tokenizer.images.crops import to_float
from tokenizer.measures import WINDOW, CodeUse, psnr, sharpness, ssim
from tokenizer.training.perceptual import LPIPS, SMALLEST, load_lpips

T = TypeVar("T")
METRICS = ("psnr", "ssim", "rfid", "lpips")


class ReconstructionScores:
    """Running scores of images against their reconstructions.

    Args:
        vocabulary: number of codes.
        count: images that will be added.
        image_size: pixels per side.
        metrics: some of ``METRICS``, and an error where one cannot be computed; None: PSNR, SSIM, and those of the
            others whose weights are at hand.
        inception_weights: Inception's file, for rFID; None: in torch's hub folder.
        lpips_weights: folder of LPIPS's files, as in :func:`~tokenizer.training.perceptual.find_files`.
        device: where the networks run.

    Attributes:
        not_computed: why, by name, of metrics that nobody asked for and that cannot be computed.

    Raises:
        UserError: an unknown metric, or weights that are missing and were asked for.
    """

    def __init__(self, vocabulary: int, count: int, image_size: int, metrics: Sequence[str] | None = None, *,
                 inception_weights: str | None = None, lpips_weights: str | None = None,
                 device: torch.device | str = "cpu"):
        for name in metrics or ():
            check_choice("a metric", name, METRICS)
        self.metrics = [name for name in METRICS if metrics is None or name in metrics]
        self.asked = set(metrics or ())
        self.asked |= {name for name, given in (("rfid", inception_weights), ("lpips", lpips_weights)) if given}
        for name in sorted(self.asked - set(self.metrics)):
            raise UserError(f"weights for {name} are given, but --metrics leaves {name} out")
        self.not_computed: dict[str, str] = {}
        self.use, self.sums, self.count, self.edges = CodeUse(vocabulary), dict.fromkeys(METRICS, 0.0), 0, np.zeros(2)
        self._try("ssim", lambda: _check_windows(image_size))
        self.inception = self._try("rfid", lambda: _inception(inception_weights, count, "rfid" in self.asked, device))
        self.lpips = self._try("lpips", lambda: _lpips(lpips_weights, image_size, device))
        self.device = device
        size = self.inception.dimensions["pool"] if self.inception else 0
        self.moments = (Moments(size), Moments(size))  # of images and of reconstructions

    def _try(self, name: str, load: Callable[[], T]) -> T | None:
        """Return what a metric needs, or None where it is not wanted or, unasked, cannot be had."""
        if name not in self.metrics:
            return None
        try:
            return load()
        except UserError as error:
            if name in self.asked:
                raise
            self.not_computed[name] = str(error)
            self.metrics.remove(name)
            return None

    def add(self, codes: Tensor, before: np.ndarray, after: np.ndarray) -> None:
        """Add a batch: codes (B, N), images and reconstructions (B, H, W, 3) uint8."""
        self.use.add(codes)
        self.count += len(before)
        self.edges += len(before) * np.array([sharpness(before), sharpness(after)])
        for name, measure in (("psnr", psnr), ("ssim", ssim)):
            if name in self.metrics:
                self.sums[name] += len(before) * measure(before, after)
        if self.lpips:
            pair = (to_float(torch.from_numpy(x).to(self.device).permute(0, 3, 1, 2)) for x in (before, after))
            self.sums["lpips"] += float(self.lpips(*pair).double().sum())
        if self.inception:
            for moments, images in zip(self.moments, (before, after)):
                moments.update(self.inception(images)["pool"])

    def result(self) -> dict[str, Any]:
        """Return means by name, code usage, ``sharpness`` (a ratio to the images'), and what was not computed.

        ``rfid`` is the Frechet distance between the reconstructions and the very images that were reconstructed: its
        reference has the role "reconstruction", and is no other set's.
        """
        scores = {name: self.sums[name] / self.count for name in self.metrics if name != "rfid"}
        about: dict[str, Any] = {}
        if self.inception:
            scores["rfid"] = frechet_distance(*(moments.finish() for moments in self.moments))
            size, warnings = self.inception.dimensions["pool"], list(self.inception.warnings)
            if self.count < size:
                warnings.append(f"{self.count} images are fewer than the {size} features: rFID is not comparable with "
                                "published ones")
            about = {"rfid_reference": {"name": "the images reconstructed", "role": "reconstruction"},
                     "rfid_features": self.inception.name, "rfid_weights_sha256": self.inception.weights_hash,
                     "rfid_warnings": warnings}
        ratio = float(self.edges[1] / self.edges[0]) if self.edges[0] else None
        return {**scores, "sharpness": ratio, **self.use.scores(), **about, "not_computed": self.not_computed}


def _inception(weights: str | None, count: int, asked: bool, device: torch.device | str) -> FeatureNetwork:
    """Return the network; unasked, it is not downloaded."""
    from mutor_img.metrics.inception import default_inception_path, load_inception  # seconds to import

    path = Path(weights) if weights else default_inception_path()
    if not asked and not path.is_file():
        raise UserError(f"no Inception weights at {path}; --metrics rfid downloads them, or --inception-weights FILE")
    if count < 2:
        raise UserError(f"rFID needs 2 images or more, not {count}")
    return load_inception(weights, device)


def _check_windows(image_size: int) -> None:
    if image_size < WINDOW:
        raise UserError(f"SSIM compares windows of {WINDOW} pixels per side, and images have {image_size}")


def _lpips(weights: str | None, image_size: int, device: torch.device | str) -> LPIPS:
    if image_size < SMALLEST:
        raise UserError(f"LPIPS needs images of {SMALLEST} pixels per side, not {image_size}")
    return load_lpips(weights, device)
