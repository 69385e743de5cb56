"""What a generator's loss is on held-out codes: of the next token, and of each code that registers look ahead to."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mutor_img.blocks import ModelConfig
from mutor_img.chunked_loss import read_out_losses
from mutor_img.data.store import Codes
from mutor_img.objectives.objective import Batch, Objective
from mutor_img.registers import IGNORE, RegisterLaw, register_targets
from mutor_img.training.runtime import Runtime
from mutor_img.transformer import Transformer


class TargetLoss(NamedTuple):
    """How well registers predict the code at one place, as seen from the code that they stand after.

    Attributes:
        down, right: rows below it and columns to its right.
        loss: mean cross-entropy, nats per register.
    """

    down: int
    right: int
    loss: float


def next_token_loss(model: nn.Module, config: ModelConfig, codes: Codes, size: int, runtime: Runtime,
                    rows: int = 0) -> float:
    """Return the next-token loss on the first views of a code store, in nats per token; all processes call this.

    Args:
        model: a :class:`Transformer`, perhaps wrapped or sharded, in eval mode.
        config: its sizes.
        codes: held-out codes.
        size: sequences per process at once.
        runtime: this process.
        rows: the most rows of logits at a time; 0: all.
    """
    plain, count = Objective(config), len(codes)
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    for first in range(0, count, runtime.world * size):
        mine = np.arange(count)[first:first + runtime.world * size][runtime.rank * size:][:size]
        images = mine if len(mine) else np.zeros(1, dtype=np.int64)  # a sharded model runs everywhere or nowhere
        labels, tokens = _on_device(codes, images, runtime)
        loss = model(within=partial(plain, batch=Batch(labels, tokens[:, :-1], tokens), rows=rows))["next_token"]
        if len(mine):
            sums += torch.stack([loss, loss.new_tensor(tokens.numel())])
    total, terms = runtime.sum(sums).tolist()
    return total / terms


@torch.no_grad()
def target_losses(model: Transformer, law: RegisterLaw, codes: Codes, count: int, size: int, runtime: Runtime,
                  rows: int = 0) -> list[TargetLoss]:
    """Return the registers' loss for each offset that they are trained for, on held-out codes; all processes call this.

    One register stands after each code. Those count whose target lies where the offset says: registers after the
    class, and targets that would go on in the next row, are left out.

    Args:
        model: whole on every process, in eval mode, with a register embedding.
        law: the registers' in training; its offsets are asked one by one.
        codes: held-out codes, of which the first views are read.
        count: how many images, at most.
        size: sequences per process at once.
        runtime: this process.
        rows: the most rows of logits at a time; 0: all.
    """
    mine = np.arange(min(count, len(codes)))[runtime.rank::runtime.world]
    anchors = torch.arange(1, law.length, device=runtime.device)  # (N - 1,)
    found = []
    for offset in law.offsets:
        down, right = divmod(offset, law.grid[1])
        sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
        for first in range(0, len(mine), size):
            labels, tokens = _on_device(codes, mine[first:first + size], runtime)
            here = anchors.expand(len(labels), -1)  # (B, N - 1)
            ahead = torch.full_like(here, offset)
            wanted = register_targets(tokens, here, ahead).masked_fill(law.runs_over(here, ahead), IGNORE)
            states = model.run(labels, tokens[:, :-1], here, ahead).states[model.config.layers]
            registers = states[:, law.length:]  # (B, N - 1, dim)
            [loss] = read_out_losses(registers, model.norm, model.output, [wanted], rows)
            sums += torch.stack([loss.double(), (wanted != IGNORE).sum().double()])
        total, terms = runtime.sum(sums).tolist()
        if terms:
            found.append(TargetLoss(down, right, total / terms))
    return found


def _on_device(codes: Codes, images: np.ndarray, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Return labels (B,) and codes (B, N) of the first views of some images."""
    tokens, labels = codes.batch(images, images * 0)
    return labels.to(runtime.device), tokens.to(runtime.device)
