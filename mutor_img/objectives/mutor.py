"""MuToR: registers among the inputs predict tokens further on (arXiv 2505.10518; ``registers.py`` has the method)."""

from __future__ import annotations

from torch import Tensor

from mutor_img.blocks import ModelConfig
from mutor_img.objectives.objective import Batch, Objective
from mutor_img.registers import RegisterLaw, count_targets, register_targets
from mutor_img.transformer import Transformer


class Mutor(Objective):
    """``(1 - a) L_ntp + a L_reg`` (paper eq. 5). It holds no weights: the registers' embedding is the model's own.

    Attributes:
        law: where registers stand and how far they look.
        weight: a.
    """

    def __init__(self, config: ModelConfig, law: RegisterLaw, weight: float):
        super().__init__(config)
        self.law, self.weight = law, weight

    def prepare(self, seed: int, step: int, samples: Tensor, labels: Tensor, codes: Tensor) -> Batch:
        return Batch(labels, codes[:, :-1], codes, *self.law.draw(seed, step, samples))

    def forward(self, model: Transformer, batch: Batch, rows: int = 0) -> dict[str, Tensor]:
        run = model.run(batch.labels, batch.codes, batch.anchors, batch.offsets)
        wanted = [batch.targets, register_targets(batch.targets, batch.anchors, batch.offsets)]  # (B, N), (B, R)
        regular, register = self.read_out(run.states[self.config.layers], model.norm, model.output, wanted, rows)
        return {"next_token": regular, "register": register}

    def terms(self, seed: int, step: int, samples: Tensor) -> dict[str, int]:
        if self.law.count is not None:  # anchors are drawn among those with a target
            registers = len(samples) * self.law.count
        else:
            registers = max(1, int(count_targets(*self.law.draw(seed, step, samples), self.config.length)))
        return {**super().terms(seed, step, samples), "register": registers}

    def weights(self, step: int, steps: int) -> dict[str, float]:
        return {"next_token": 1 - self.weight, "register": self.weight}
