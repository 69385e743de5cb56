"""Sequential heads: a chain of small models, each of which reads one token more and predicts the one after it.

DeepSeek-V3's multi-token prediction (arXiv 2412.19437, section 2.2, eq. 21-25).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mutor_img.blocks import Block, ModelConfig, RMSNorm, block_flops, draw_weights
from mutor_img.common.errors import check_range
from mutor_img.common.linear import Linear
from mutor_img.objectives.objective import Batch, Objective
from mutor_img.transformer import Transformer


class Depth(nn.Module):
    """One link of the chain: ``block(mix [norm(state); norm(token)])``, and the norm before the shared output."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.state_norm, self.token_norm, self.norm = (RMSNorm(config.dim) for _ in range(3))
        self.mix = Linear(2 * config.dim, config.dim)
        self.block = Block(config, config.drop_path)
        draw_weights(self)

    def join(self, state: Tensor, token: Tensor) -> Tensor:
        """Return what the block reads, (B, N, dim), in the residual stream's precision."""
        return self.mix(torch.cat([self.state_norm(state), self.token_norm(token)], dim=-1)).type_as(state)


class SequentialHeads(Objective):
    """``L_ntp + lambda mean_k L_k``: depth k, at row t = 0 .. N-1-k, reads x_{t+k} and predicts x_{t+k+1}.

    It reads depth k - 1's state at the same row, at depth 1 the trunk's before its last norm. Row t has position id
    t + k, that of the regular input which predicts the same token. Embeddings and output are the model's.
    """

    def __init__(self, config: ModelConfig, depths: int = 1, weight: float = 0.3, late_weight: float = 0.1,
                 late_from: int | None = None):
        """Build the chain.

        Args:
            config: the model's sizes.
            depths: D.
            weight: lambda.
            late_weight: lambda from update ``late_from`` on.
            late_from: None: lambda stays.

        Raises:
            UserError: a value out of range.
        """
        super().__init__(config)
        check_range("objective.depths", depths, 1, config.length - 1)
        check_range("objective.weight", weight, 0.0, 100.0)
        check_range("objective.late_weight", late_weight, 0.0, 100.0)
        check_range("objective.late_from", 0 if late_from is None else late_from, 0, 10**9)
        self.weight, self.late_weight, self.late_from = weight, late_weight, late_from
        self.read_outs = depths
        self.depths = nn.ModuleList(Depth(config) for _ in range(depths))

    def forward(self, model: Transformer, batch: Batch, rows: int = 0) -> dict[str, Tensor]:
        """Return sums: ``next_token``, and for each depth k ``depth_k``, its cross-entropy k codes further on."""
        n = self.config.length
        run = model.run(batch.labels, batch.codes)
        sums = {"next_token": self.next_token(model, run, batch, rows)}
        state, row = run.states[self.config.layers], torch.arange(n, device=batch.targets.device)
        for k, (depth, keys) in enumerate(zip(self.depths, run.keys), start=1):
            # The last k rows have no target. They stay, with any token, so that shapes do; no other row sees them.
            ids = (row + k).clamp(max=n - 1)  # (N,) the position id t + k, and in 1 .. N the place of x_{t+k}
            token = model.tok_embeddings(batch.targets[:, ids - 1])  # (B, N, dim)
            state = depth.block(depth.join(state, token), model.rope(ids)[None], run.attend, keys)  # (B, N, dim)
            wanted = batch.targets[:, k:]  # (B, N - k)
            [sums[f"depth_{k}"]] = self.read_out(state[:, :n - k], depth.norm, model.output, [wanted], rows)
        return sums

    def terms(self, seed: int, step: int, samples: Tensor) -> dict[str, int]:
        depths = {f"depth_{k}": len(samples) * (self.config.length - k) for k in range(1, len(self.depths) + 1)}
        return {**super().terms(seed, step, samples), **depths}

    def weights(self, step: int, steps: int) -> dict[str, float]:
        late = self.late_from is not None and step >= self.late_from
        share = (self.late_weight if late else self.weight) / len(self.depths)
        return {"next_token": 1.0, **{f"depth_{k}": share for k in range(1, len(self.depths) + 1)}}

    def blocks(self) -> list[nn.Module]:
        return [depth.block for depth in self.depths]

    def extra_flops(self, step: int) -> tuple[float, float]:
        n, c = self.config.length, self.config
        link = block_flops(c, n, n * (n + 1) / 2) + 2.0 * 2 * c.dim**2 * n
        return sum(link + 2.0 * c.dim * c.vocabulary * (n - k) for k in range(1, len(self.depths) + 1)), 0.0
