"""Parallel heads: blocks of their own read the trunk's states and predict tokens further on, to the right or below.

Gloeckle et al., "Better & Faster Large Language Models via Multi-token Prediction" (arXiv 2404.19737, eq. 2); in 2D,
MTAR's heads on the final feature.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mutor_img.blocks import Block, ModelConfig, block_flops, draw_weights
from mutor_img.common.errors import check_range
from mutor_img.common.linear import Linear
from mutor_img.objectives.objective import Batch, Objective
from mutor_img.registers import check_offsets
from mutor_img.transformer import Transformer


class Head(nn.Module):
    """Blocks, and perhaps an output head; without one, the model's is shared. The last norm always is."""

    def __init__(self, config: ModelConfig, blocks: int, own_output: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, config.drop_path) for _ in range(blocks))
        self.output = Linear(config.dim, config.vocabulary) if own_output else None
        draw_weights(self)
        if self.output is not None:
            nn.init.zeros_(self.output.weight)  # as the model's: the first loss is ln(vocabulary)


class ParallelHeads(Objective):
    """``(1 - a) CE_1 + a mean_d CE_d``: after input t, the head of offset d predicts x_{t+d}, for t = 0 .. N - d.

    With ``tap_from_end`` 1 the model's last block is one head among others, that of d = 1 (Gloeckle et al.); with 0,
    heads stand on what the model reads its own prediction from (MTAR: two blocks and an output each).
    """

    def __init__(self, config: ModelConfig, offsets: Sequence[int] = (2,), tap_from_end: int = 1, blocks: int = 1,
                 own_output: bool = False, weight: float = 0.1):
        """Build the heads.

        Args:
            config: the model's sizes.
            offsets: raster offsets d: 2 is one to the right of the next token; the grid's width w is the cell below
                the token just read, w + 1 that below the next token.
            tap_from_end: how many of the model's blocks the heads leave out: they read what the block before has made.
            blocks: of each head.
            own_output: each head has an output matrix of its own.
            weight: a.

        Raises:
            UserError: a value out of range.
        """
        super().__init__(config)
        check_offsets("objective.offsets", offsets, config.length)
        check_range("objective.tap_from_end", tap_from_end, 0, config.layers)
        check_range("objective.blocks", blocks, 1, 100)
        check_range("objective.weight", weight, 0.0, 1.0)
        self.offsets, self.weight, self.tap = tuple(sorted(offsets)), weight, config.layers - tap_from_end
        self.read_outs = len(self.offsets)
        self.heads = nn.ModuleList(Head(config, blocks, own_output) for _ in self.offsets)

    def forward(self, model: Transformer, batch: Batch, rows: int = 0) -> dict[str, Tensor]:
        """Return sums: ``next_token``, and for each offset d ``head_d``, the cross-entropy of its head."""
        run = model.run(batch.labels, batch.codes, taps=(self.tap, self.config.layers))
        sums, keys = {"next_token": self.next_token(model, run, batch, rows)}, iter(run.keys)
        for offset, head in zip(self.offsets, self.heads):
            x = run.states[self.tap]  # (B, N, dim)
            for block in head.blocks:
                x = block(x, run.rope, run.attend, next(keys))
            x = x[:, :self.config.length - offset + 1]  # (B, N - d + 1, dim): the rest has no target
            output = model.output if head.output is None else head.output
            wanted = batch.targets[:, offset - 1:]  # (B, N - d + 1)
            [sums[f"head_{offset}"]] = self.read_out(x, model.norm, output, [wanted], rows)
        return sums

    def terms(self, seed: int, step: int, samples: Tensor) -> dict[str, int]:
        heads = {f"head_{d}": len(samples) * (self.config.length - d + 1) for d in self.offsets}
        return {**super().terms(seed, step, samples), **heads}

    def weights(self, step: int, steps: int) -> dict[str, float]:
        return {"next_token": 1 - self.weight, **{f"head_{d}": self.weight / len(self.offsets) for d in self.offsets}}

    def blocks(self) -> list[nn.Module]:
        return [block for head in self.heads for block in head.blocks]

    def extra_flops(self, step: int) -> tuple[float, float]:
        n, c = self.config.length, self.config
        blocks = len(self.blocks()) * block_flops(c, n, n * (n + 1) / 2)
        return blocks + sum(2.0 * c.dim * c.vocabulary * (n - d + 1) for d in self.offsets), 0.0
