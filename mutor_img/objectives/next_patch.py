"""Next-patch prediction: at first a sequence is of patches of codes, each read as the mean of its codes' embeddings.

"Next Patch Prediction for Autoregressive Visual Generation" (arXiv 2412.15321).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from mutor_img.attention import SdpaAttention
from mutor_img.blocks import ModelConfig, RotaryTable, model_flops
from mutor_img.common.errors import UserError
from mutor_img.objectives.objective import Batch, Objective
from mutor_img.transformer import Transformer


class NextPatch(Objective):
    """Stages of patches of p x p codes, p falling to 1, which is next-token prediction. It holds no weights.

    Row j reads patches 1 .. j and predicts all codes of patch j + 1 by one distribution:
    ``L = -mean over rows and codes of log p_j(code)``. A stage has rotary positions of its own, those of a grid of
    h/p x w/p cells.

    Attributes:
        tables: by p, as text, the rotary positions of each stage but the last.
    """

    def __init__(self, config: ModelConfig, patches: Sequence[int] = (2, 1), stage_ends: Sequence[int] = ()):
        """Build the tables of positions.

        Args:
            config: the model's sizes.
            patches: p of each stage, falling to 1.
            stage_ends: the updates at which the stages after the first begin.

        Raises:
            UserError: no such stages, or patches that do not fill the grid.
        """
        super().__init__(config)
        patches, stage_ends = list(patches), list(stage_ends)
        if not patches or patches[-1] != 1 or any(a <= b for a, b in pairwise(patches)):
            raise UserError(f"objective.patches is {patches}; give patch sides that fall to 1, as in [2, 1]")
        for p in patches:
            if config.grid[0] % p or config.grid[1] % p:
                raise UserError(f"objective.patches has {p}, but patches of {p} x {p} do not fill {config.grid[0]} x "
                                f"{config.grid[1]} codes; give sides that divide both")
        if len(stage_ends) != len(patches) - 1 or any(a >= b for a, b in pairwise([0, *stage_ends])):
            raise UserError(f"objective.stage_ends is {stage_ends}; for objective.patches={patches} give "
                            f"{len(patches) - 1} rising update(s), at which the next stage begins")
        self.patches, self.stage_ends = patches, stage_ends
        self.tables = nn.ModuleDict({
            str(p): RotaryTable((config.grid[0] // p, config.grid[1] // p), config.dim // config.heads)
            for p in patches if p > 1})

    def side(self, step: int) -> int:
        """Return p at update ``step``."""
        return self.patches[bisect_right(self.stage_ends, step)]

    def prepare(self, seed: int, step: int, samples: Tensor, labels: Tensor, codes: Tensor) -> Batch:
        p, (rows, columns) = self.side(step), self.config.grid
        if p == 1:
            return super().prepare(seed, step, samples, labels, codes)
        patches = rearrange(codes, "b (i p j q) -> b (i j) (p q)", i=rows // p, p=p, j=columns // p, q=p)
        return Batch(labels, patches[:, :-1], patches, side=p)  # (B, P - 1, p * p), (B, P, p * p)

    def forward(self, model: Transformer, batch: Batch, rows: int = 0) -> dict[str, Tensor]:
        if batch.side == 1:
            return super().forward(model, batch, rows)
        means = model.tok_embeddings(batch.codes).mean(dim=2)  # (B, P - 1, dim)
        x = torch.cat([model.cls_embedding(batch.labels)[:, None], means], dim=1)  # (B, P, dim)
        places = torch.arange(x.shape[1], device=x.device)
        run = model.through(x, self.tables[str(batch.side)](places)[None], SdpaAttention(x.shape[1]))
        return {"next_patch": self.next_token(model, run, batch, rows)}

    def terms(self, seed: int, step: int, samples: Tensor) -> dict[str, int]:
        return dict.fromkeys(self.weights(step, 0), len(samples) * self.config.length)  # each code is predicted once

    def weights(self, step: int, steps: int) -> dict[str, float]:
        return {"next_token" if self.side(step) == 1 else "next_patch": 1.0}

    def extra_flops(self, step: int) -> tuple[float, float]:
        n = self.config.length
        rows = n // self.side(step) ** 2
        whole, found = (model_flops(self.config, count, count * (count + 1) / 2) for count in (n, rows))
        return found - whole, 0.0
