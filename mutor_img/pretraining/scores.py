"""Scores of a generator while it trains: few samples, by the code of ``evaluate_fid.py``, on all processes."""

from __future__ import annotations

from typing import Any

import torch

from mutor_img.checkpoints.folder import fill_blank
from mutor_img.decoding.sampler import SamplingSettings
from mutor_img.metrics.evaluator import check_sets, evaluate
from mutor_img.metrics.networks import load_features
from mutor_img.metrics.references import identity, open_reference
from mutor_img.metrics.requirements import SCORES, resolve
from mutor_img.pretraining.config import EvalConfig
from mutor_img.sampling.labels import make_labels
from mutor_img.sampling.pictures import PUT_BACK, verified_tokenizer
from mutor_img.sampling.source import ModelImages
from mutor_img.training.runtime import Runtime
from mutor_img.transformer import Transformer, sampled_weights

BATCH = 64  # images per process at once


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
        self.tokenizer = verified_tokenizer(codes, runtime.device, model.config, "the run", PUT_BACK)
        self.reference = open_reference(config.reference)
        check_sets(self._images(model), self.reference)
        with runtime.main_first():  # last: it may have to be downloaded
            self.network = load_features(config.features, config.features_weights, runtime.device)
        runtime.agree({"the feature network": self.network.weights_hash,
                       f"the content of eval.reference={config.reference}": identity(self.reference)})
        self.metrics = resolve(config.metrics or None, self.reference, self.network)

    def _images(self, model: Transformer) -> ModelImages:
        labels = make_labels("random", range(self.classes), self.config.samples, self.settings.seed)
        # Nothing is compiled or kept: weights move before the next score, and training needs the memory.
        return ModelImages(model, self.tokenizer, labels, self.settings, BATCH, "the run", keep=False)

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
    with torch.device("meta"):
        copy = Transformer(model.config)
    weights = {name: weight.to(torch.bfloat16) for name, weight in sampled_weights(model.state_dict()).items()}
    return fill_blank(copy, weights, model.output.weight.device).eval()
