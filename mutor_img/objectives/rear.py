"""reAR: the inputs are noisy, and inner states are to match the tokenizer's own vectors of the codes.

"reAR: Rethinking Visual Autoregressive Models via Generator-Tokenizer Consistency Regularization" (arXiv 2510.04450,
eq. 4-6).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mutor_img.blocks import ModelConfig
from mutor_img.common.errors import check_range
from mutor_img.common.streams import Stream, integers, uniform
from mutor_img.objectives.objective import Batch, Objective
from mutor_img.objectives.projectors import WIDTH, cosine, projector, projector_flops, projector_numbers
from mutor_img.transformer import Transformer

ACTIVATIONS = {2: nn.GELU, 3: nn.SiLU}  # by the number of layers: as printed, and as in the authors' code


class Rear(Objective):
    """``L_ntp + lambda (E + D)`` over noisy inputs; the targets are clean.

    E: after block 1, input t = 1 .. N-1 is to give the vector of the code x_t that it stands for. D: after block
    3L/4 + 1, input t = 0 .. N-1 is to give that of the next code. Both are means of minus the cosine.

    Attributes:
        deep: after how many blocks D reads.
    """

    def __init__(self, config: ModelConfig, noise_until: int, weight: float = 1.0, code_dim: int = 8,
                 mlp_layers: int = 2, keep_replaced: bool = False):
        """Build the two networks that turn states into vectors.

        Args:
            config: the model's sizes.
            noise_until: the update from which inputs are clean; 0: they always are.
            weight: lambda; 0: noise alone, without networks or vectors.
            code_dim: c, the numbers of the tokenizer's vectors.
            mlp_layers: of each network: 2 with GELU, or 3 with SiLU.
            keep_replaced: E counts inputs that noise has changed, too.

        Raises:
            UserError: a value out of range.
        """
        super().__init__(config)
        check_range("objective.noise_until", noise_until, 0, 10**9)
        check_range("objective.weight", weight, 0.0, 100.0)
        check_range("objective.code_dim", code_dim, 1, 10**4)
        check_range("objective.mlp_layers", mlp_layers, 2, 3)
        self.noise_until, self.weight, self.keep_replaced = noise_until, weight, keep_replaced
        self.deep = 3 * config.layers // 4 + 1
        if weight:
            self.code_dim = code_dim
            widths = (config.dim, *[WIDTH] * (mlp_layers - 1), code_dim)
            self.encode, self.decode = (projector(widths, ACTIVATIONS[mlp_layers]) for _ in range(2))
            self.kept_numbers = 2 * projector_numbers(self.encode)

    def prepare(self, seed: int, step: int, samples: Tensor, labels: Tensor, codes: Tensor) -> Batch:
        """Replace inputs by uniform codes, each with a sequence's own probability, uniform in 0 .. 1 - step / until."""
        batch = super().prepare(seed, step, samples, labels, codes)
        if step < self.noise_until:
            place = torch.arange(codes.shape[1] - 1, device=codes.device)  # (N - 1,)
            most, each = 1 - step / self.noise_until, samples[:, None]  # (B, 1)
            share = most * uniform(seed, Stream.NOISE, step, each)  # (B, 1)
            replaced = uniform(seed, Stream.NOISE, step, each, place, 0) < share  # (B, N - 1)
            drawn = integers(self.config.vocabulary, seed, Stream.NOISE, step, each, place, 1)
            batch.codes = torch.where(replaced, drawn, batch.codes)
        return batch

    def forward(self, model: Transformer, batch: Batch, rows: int = 0) -> dict[str, Tensor]:
        """Return sums: ``next_token``, with a weight ``encode`` and ``decode`` too, minus cosines with codes."""
        taps = (1, self.deep, self.config.layers) if self.weight else (self.config.layers,)
        run = model.run(batch.labels, batch.codes, taps=taps)
        sums = {"next_token": self.next_token(model, run, batch, rows)}
        if self.weight:
            vectors = self.codebook[batch.targets]  # (B, N, c), of x_1 .. x_N
            current = cosine(self.encode(run.states[1][:, 1:]), vectors[:, :-1])  # (B, N - 1)
            if not self.keep_replaced:
                current = current.where(batch.codes == batch.targets[:, :-1], 0.0)
            sums["encode"] = -current.sum()
            sums["decode"] = -cosine(self.decode(run.states[self.deep]), vectors).sum()
        return sums

    def terms(self, seed: int, step: int, samples: Tensor) -> dict[str, int]:
        n, count = self.config.length, len(samples)  # the number of changed inputs moves no divisor
        beside = {"encode": count * (n - 1), "decode": count * n} if self.weight else {}
        return {**super().terms(seed, step, samples), **beside}

    def weights(self, step: int, steps: int) -> dict[str, float]:
        return {"next_token": 1.0, **({"encode": self.weight, "decode": self.weight} if self.weight else {})}

    def extra_flops(self, step: int) -> tuple[float, float]:
        n = self.config.length
        return (2 * n - 1) * projector_flops(self.encode) if self.weight else 0.0, 0.0
