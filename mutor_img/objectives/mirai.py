"""Mirai-E: inner states are to tell, by a small network each, what the averaged model makes of inputs further on.

"Mirai" (arXiv 2601.14671), the variant whose targets come from the run's own averaged weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mutor_img.blocks import ModelConfig, block_flops
from mutor_img.common.errors import check_range
from mutor_img.objectives.objective import Batch, Objective
from mutor_img.objectives.projectors import WIDTH, cosine, projector, projector_flops, projector_numbers
from mutor_img.registers import check_offsets
from mutor_img.transformer import Transformer


class Mirai(Objective):
    """``L_ntp + c sum_o A_o``: A_o is minus the mean cosine of rho_o(h_t) and the average's state at input t + o.

    Both states stand after the same block. Pairs are (0, 0), the class with itself whatever o is, and (t, t + o) for
    t = 1 .. N-1-o. Each offset has a network rho_o of its own. The average reads undropped labels, in eval mode.
    """

    def __init__(self, config: ModelConfig, offsets: Sequence[int] = (), tap: int | None = None, weight: float = 2.0,
                 starts_at: int = 0, late_weight: float = 1.0, late_from: int | None = None):
        """Build the networks.

        Args:
            config: the model's sizes.
            offsets: o, in raster order; (): 0, 1 and the grid's width. 0 alone is the control, which holds no future.
            tap: after which block the states stand; None: two thirds of them, 8 of 12.
            weight: c.
            starts_at: the update from which c is not 0.
            late_weight: c from update ``late_from`` on.
            late_from: None: c stays.

        Raises:
            UserError: a value out of range.
        """
        super().__init__(config)
        offsets = tuple(offsets) or (0, 1, config.grid[1])
        check_offsets("objective.offsets", offsets, config.length - 1, lowest=0)
        self.tap = max(1, 2 * config.layers // 3) if tap is None else tap
        check_range("objective.tap", self.tap, 1, config.layers)
        check_range("objective.weight", weight, 0.0, 100.0)
        check_range("objective.starts_at", starts_at, 0, 10**9)
        check_range("objective.late_weight", late_weight, 0.0, 100.0)
        check_range("objective.late_from", 0 if late_from is None else late_from, 0, 10**9)
        self.offsets, self.teacher_taps = tuple(sorted(offsets)), (self.tap,)
        self.weight, self.starts_at, self.late_weight, self.late_from = weight, starts_at, late_weight, late_from
        widths = (config.dim, WIDTH, WIDTH, config.dim)
        self.projectors = nn.ModuleList(projector(widths, nn.SiLU) for _ in self.offsets)
        self.kept_numbers = sum(projector_numbers(rho) for rho in self.projectors)

    def forward(self, model: Transformer, batch: Batch, rows: int = 0) -> dict[str, Tensor]:
        """Return sums: ``next_token``, and for each offset o ``align_o``, minus cosines with the teacher's states."""
        n = self.config.length
        run = model.run(batch.labels, batch.codes, taps=(self.tap, self.config.layers))
        sums = {"next_token": self.next_token(model, run, batch, rows)}
        state, taught = run.states[self.tap], batch.teacher[self.tap]  # (B, N, dim)
        for o, rho in zip(self.offsets, self.projectors):
            wanted = torch.cat([taught[:, :1], taught[:, 1 + o:]], dim=1)  # (B, N - o, dim)
            sums[f"align_{o}"] = -cosine(rho(state[:, :n - o]), wanted).sum()
        return sums

    def terms(self, seed: int, step: int, samples: Tensor) -> dict[str, int]:
        pairs = {f"align_{o}": len(samples) * (self.config.length - o) for o in self.offsets}
        return {**super().terms(seed, step, samples), **pairs}

    def weights(self, step: int, steps: int) -> dict[str, float]:
        late = self.late_from is not None and step >= self.late_from
        # Before the start it is 0 and not absent: a network without a gradient would stop a run of several processes.
        c = 0.0 if step < self.starts_at else self.late_weight if late else self.weight
        return {"next_token": 1.0, **{f"align_{o}": c for o in self.offsets}}

    def extra_flops(self, step: int) -> tuple[float, float]:
        n = self.config.length
        trained = sum((n - o) * projector_flops(rho) for o, rho in zip(self.offsets, self.projectors))
        return trained, self.tap * block_flops(self.config, n, n * (n + 1) / 2)
