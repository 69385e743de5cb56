"""Scores of a generator while it trains: few samples, by the code of ``evaluate_fid.py``, on all processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from mutor_img.errors import UserError, check_range
from mutor_img.generation import SamplingSettings
from mutor_img.metrics.evaluator import evaluate
from mutor_img.metrics.networks import check_features, load_network
from mutor_img.metrics.references import open_reference
from mutor_img.metrics.requirements import SCORES, check_names, check_size, resolve
from mutor_img.sampling.labels import make_labels
from mutor_img.sampling.pictures import verified_tokenizer
from mutor_img.sampling.source import ModelImages
from mutor_img.training.runtime import Runtime
from mutor_img.transformer import Transformer

BATCH = 64  # images a process at once


@dataclass
class EvalConfig:
    """The scores computed while training; few samples stand for a trend, not for a figure to report."""

    every: int = 0  # steps between scores, and at the end; 0: never
    samples: int = 2000  # samples a score; their Frechet distance stands above that of 50000
    reference: str = ""  # what evaluate_fid.py --reference takes
    metrics: list[str] = field(default_factory=list)  # of fid, sfid, is, pr, kid; empty: all that the reference allows
    features: str = "inception"  # or mnist, or timm:NAME
    features_weights: str | None = None  # classifier folder, timm weights, or Inception's file where it is elsewhere
    cfg_scale: float = 2.0  # guidance scale

    def validate(self) -> None:
        check_range("eval.every", self.every, 0, 10**9)
        check_range("eval.samples", self.samples, 2, 10**7)
        check_range("eval.cfg_scale", self.cfg_scale, 1.0, 100.0)
        if self.metrics:
            check_names(self.metrics)
        check_features(self.features, None if self.features == "inception" else self.features_weights)
        if self.every and not self.reference:
            raise UserError("eval.reference is empty; eval.every needs a reference to score against")


class RunScores:
    """One reference, one network and the run's tokenizer, opened once for all the scores of a run."""

    def __init__(self, config: EvalConfig, codes: dict[str, Any], model: Transformer, seed: int, runtime: Runtime):
        """Open everything, so that what is missing ends a run before it begins.

        Args:
            config: what is scored, and how.
            codes: the run's metadata of its codes, which names the tokenizer.
            model: the generator, for its shapes.
            seed: of labels and random streams; every score of a run is of the same ones.
            runtime: this process.

        Raises:
            UserError: a reference, weights or a tokenizer that is not there or does not fit, or a metric that the
                reference does not allow.
        """
        self.config, self.runtime, self.classes = config, runtime, model.config.classes
        self.settings = SamplingSettings(cfg_scale=config.cfg_scale, seed=seed)
        self.tokenizer = verified_tokenizer(codes, runtime.device, model, "the run's codes")
        weights = (None, config.features_weights) if config.features == "inception" else (config.features_weights, None)
        self.network = load_network(config.features, *weights, runtime)
        self.reference = open_reference(config.reference)
        self.metrics = resolve(config.metrics or None, self.reference, self.network)
        check_size(self._images(model), self.reference)

    def _images(self, model: Transformer) -> ModelImages:
        labels = make_labels("random", range(self.classes), self.config.samples, self.settings.seed)
        return ModelImages(model, self.tokenizer, labels, self.settings, BATCH, "the run")

    def __call__(self, model: Transformer) -> dict[str, float]:
        """Return the scores by name ("eval_fid", ...); {} on ranks other than 0, all of which must call.

        Raises:
            UserError: the weights give logits that are not finite, on every rank alike.
        """
        if self.runtime.device.type == "cuda":
            model = as_sampled(model)
        result = evaluate(self._images(model), self.reference, self.network, metrics=self.metrics, batch_size=BATCH)
        return {f"eval_{name}": float(result[name]) for name in (*SCORES, "num_samples") if name in result}


def as_sampled(model: Transformer) -> Transformer:
    """Return a copy in bf16, the precision in which ``sample.py`` runs on a GPU."""
    with torch.random.fork_rng(devices=[]), torch.device(model.output.weight.device):
        copy = Transformer(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(torch.bfloat16).eval()
