"""One run judged: samples scored at each guidance scale, held-out losses, and what is drawn of it later."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mutor_img.checkpoints.folder import checkpoint_at, read_meta
from mutor_img.checkpoints.loading import Loaded, load_run
from mutor_img.checkpoints.tensor_files import has_group
from mutor_img.common.arrays import save_npy
from mutor_img.common.errors import UserError
from mutor_img.data.store import Codes
from mutor_img.decoding.sampler import SamplingSettings
from mutor_img.metrics.features import FeatureNetwork
from mutor_img.metrics.networks import load_features
from mutor_img.metrics.references import Reference, open_reference
from mutor_img.pretraining.held_out import next_token_loss, target_losses
from mutor_img.pretraining.plan import run_flops, run_parameters
from mutor_img.pretraining.task import open_codes
from mutor_img.sampling.labels import readable_names
from mutor_img.sampling.options import DTYPES
from mutor_img.sampling.pictures import sample_images, verified_tokenizer
from mutor_img.sampling.source import SampleSource
from mutor_img.study.comparison.config import ComparisonConfig
from mutor_img.study.comparison.jobs import Job, row_jobs
from mutor_img.study.comparison.ledger import (
    ROWS,
    TARGETS,
    add,
    check_same_codes,
    check_same_judge,
    scored,
    scoring_key,
    targets,
)
from mutor_img.sweep.points import grid, sweep, sweep_key
from mutor_img.training.runtime import Runtime
from mutor_img.transformer import Transformer
from tokenizer.network.interface import ImageTokenizer

# What a score depends on beside weights and guidance, by the names of a sweep's key.
JUDGE = ("tokenizer_hash", "features", "features_hash", "reference", "reference_hash", "seed", "dtype", "device")


def score_job(study: ComparisonConfig, job: Job, runtime: Runtime) -> None:
    """Score every checkpoint of a run at every guidance scale; what is scored is left alone. All processes call this.

    Rows are added to the study's ``rows.jsonl`` as they come.

    Raises:
        UserError: a checkpoint that is not there, or what :func:`~mutor_img.sweep.points.sweep` raises.
    """
    done = runtime.from_main(lambda: [list(place) for place in scored(study, [job])])
    missing = {step: [scale for scale in study.guidance if [job.row, job.seed, step, scale] not in done]
               for step in job.steps}
    if not any(missing.values()):
        return
    reference, model = open_reference(study.reference), None
    with runtime.main_first():
        network = load_features(study.features, study.features_weights, runtime.device)
    for step, scales in missing.items():
        if scales:
            model = _Scorer(study, job, step, runtime, network, reference).run(scales, model)


class _Scorer:
    """One checkpoint, opened."""

    def __init__(self, study: ComparisonConfig, job: Job, step: int, runtime: Runtime, network: FeatureNetwork,
                 reference: Reference):
        self.study, self.job, self.step, self.runtime = study, job, step, runtime
        self.network, self.reference = network, reference
        self.folder = checkpoint_at(job.run_dir, step)
        if not (self.folder / "checkpoint.json").is_file():
            raise UserError(f"{self.folder}: was not kept when {job.title} was trained; leave {step} out of "
                            f"checkpoints, or remove {job.run_dir} to train again" if job.trained else
                            f"{self.folder}: no such checkpoint; train {job.title} first: python train.py "
                            f"{' '.join(job.words)}")
        self.meta = read_meta(self.folder)
        self.loaded = load_run(self.folder, device=runtime.device)
        self.tokenizer = verified_tokenizer(self.loaded.codes, runtime.device, self.loaded.model.config, self.folder)

    def run(self, scales: Collection[float], model: Transformer | None) -> Transformer:
        """Score at these scales; what is drawn later is written before the first row says that all is there.

        Args:
            scales: of guidance.
            model: what the run's checkpoint before was sampled from, and takes over this one's weights: a step that
                was compiled for it serves again.

        Returns:
            What was sampled from.
        """
        config = self.job.config
        val_codes = open_codes(config.data.val_codes, config, self.runtime) if config.data.val_codes else None
        codes = {"codes_hashes": [store["hash"] for store in self.meta["codes"]["stores"]],
                 **({"val_codes_hash": val_codes.content_hash()} if val_codes else {})}
        self.runtime.from_main(lambda: check_same_codes(self.study, row_jobs(self.study, self.job.row), codes))
        held_out = self._held_out(val_codes) if val_codes else {}  # in fp32, before the weights are cast
        dtype = "bf16" if self.runtime.device.type == "cuda" else "fp32"
        self.loaded.model.to(DTYPES[dtype])
        if model is not None:
            model.load_state_dict(self.loaded.model.state_dict())
            model.origin, self.loaded.model = self.loaded.model.origin, model
        settings = SamplingSettings(seed=self.job.seed, temperature=self.study.temperature)
        classes = self.loaded.model.config.classes
        source = SampleSource(self.loaded, self.tokenizer, settings, "random", None,
                              readable_names(self.loaded.codes.get("class_names"), classes), dtype)
        if self.runtime.is_main and self.job.seed == self.study.seeds[0]:
            for scale in self.study.guidance:
                draw_strip(self.study, self.job, self.step, scale, self.loaded, self.tokenizer)
        about = self._about() | codes | held_out
        points = grid([scale for scale in self.study.guidance if scale in scales], [self.study.temperature])
        judge = self._judge(source)
        rows = sweep(source, points, self.study.samples, self.reference, self.network,
                     metrics=self.study.metrics or None, batch_size=self.study.batch_size, progress=True)
        for row in rows:
            if not self.runtime.is_main:
                continue
            scoring = {"scoring_seconds": row.pop("seconds")}  # seconds are those of training, in a study's rows
            add(self.study, ROWS, about | row | scoring | {"judged_by": judge})
            tqdm.write(f"{self.job.title}: {self.step} updates, guidance {row['cfg_scale']:g}: " + ", ".join(
                f"{name} {row[name]:.4f}" for name in ("fid", "fd") if name in row))
        return self.loaded.model

    def _judge(self, source: SampleSource) -> dict[str, Any]:
        """Return what the scores depend on beside the weights, once it is that of the rows that are there."""
        key = sweep_key(source, self.study.samples, self.reference, self.network, self.study.metrics)
        judge = {name: key[name] for name in JUDGE}
        self.runtime.from_main(lambda: check_same_judge(self.study, judge))
        return judge

    def _about(self) -> dict[str, Any]:
        """Return what a row says of its run at this checkpoint."""
        sampled, trained = run_parameters(self.job.config)
        return {"row": self.job.row, "seed": self.job.seed, "updates": self.step, "config_hash": self.job.key,
                "scoring_hash": scoring_key(self.study), "weights_hash": self.loaded.weights_hash,
                "weights": self.loaded.which, "flops": run_flops(self.job.config, self.step),
                "seconds": self.meta["seconds"], "trained_on": " and ".join(self.meta.get("devices", [])),
                "sampled_parameters": sampled, "trained_parameters": trained}

    def _held_out(self, codes: Codes) -> dict[str, float]:
        """Return the next-token losses on held-out codes, and add the line of losses per target."""
        config, runtime = self.job.config, self.runtime
        losses = {"val_next_token": self._next_token(self.loaded, codes)}
        if self.loaded.which == "ema" and has_group(self.meta["files"], "model"):
            raw = load_run(self.folder, ema=False, device=runtime.device)
            losses["val_next_token_raw"] = self._next_token(raw, codes)
        if self.study.held_out and config.law().registers:
            self._target_losses(codes)
        return losses

    @torch.no_grad()
    def _next_token(self, loaded: Loaded, codes: Codes) -> float:
        rows = self.job.config.model.loss_chunk
        return next_token_loss(loaded.model, loaded.model.config, codes, self.study.batch_size, self.runtime, rows)

    def _target_losses(self, codes: Codes) -> None:
        place = (self.job.row, self.job.seed, self.step)
        if self.runtime.from_main(lambda: place in targets(self.study, [self.job])):
            return
        found = target_losses(self.loaded.model, self.job.config.law(), codes, self.study.held_out,
                              self.study.batch_size, self.runtime, self.job.config.model.loss_chunk)
        if self.runtime.is_main:
            row, seed, updates = place
            add(self.study, TARGETS, {"row": row, "seed": seed, "updates": updates, "config_hash": self.job.key,
                                      "weights_hash": self.loaded.weights_hash, "held_out": self.study.held_out,
                                      "losses": [list(t) for t in found]})


def strip_path(study: ComparisonConfig, job: Job, step: int, scale: float) -> Path:
    """Return where the images of one line of the grid of samples are."""
    return job.run_dir / "study" / (f"samples_{step:08d}_guidance_{scale:g}_temperature_{study.temperature:g}_"
                                    f"{study.grid_images}.npy")


def draw_strip(study: ComparisonConfig, job: Job, step: int, scale: float, loaded: Loaded,
               tokenizer: ImageTokenizer) -> None:
    """Write images of classes spread over all: their labels and random streams are those of every row."""
    path, classes = strip_path(study, job, step, scale), loaded.model.config.classes
    numbers = torch.arange(study.grid_images)
    settings = SamplingSettings(cfg_scale=scale, temperature=study.temperature, seed=job.seed)
    labels = numbers * classes // study.grid_images
    images = sample_images(loaded.model, tokenizer, labels, numbers, settings, keep=False)
    save_npy(path, images.dtype, images.shape, [images])

