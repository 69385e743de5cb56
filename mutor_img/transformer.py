"""The class-conditional transformer over VQ codes: LlamaGen's architecture (arXiv 2406.06525) with registers.

State-dict names and rounding are those of the released LlamaGen weights, so that these load without renaming; MuToR
adds ``register_embedding.weight``. The model knows nothing of files, devices or parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn

from mutor_img.attention import FlexAttention, SdpaAttention
from mutor_img.blocks import (
    Attend,
    Block,
    LabelEmbedding,
    ModelConfig,
    RMSNorm,
    RotaryTable,
    draw_weights,
    model_flops,
)
from mutor_img.common.dropout import dropout, row_keys
from mutor_img.common.hub import HubModel
from mutor_img.common.linear import Linear
from mutor_img.registers import embedding_rows, register_ids

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One run of sequences through the blocks.

    Attributes:
        states: by the number of blocks passed, the residual stream (B, S + R, dim) as it stands before the last norm.
        rope: (1 or B, S + R, 2, head_dim), what :class:`RotaryTable` gives for the position ids.
        attend: who sees whom.
        keys: for each of the objective's blocks, what it is to be called with as ``keys``.
    """

    states: dict[int, Tensor]
    rope: Tensor
    attend: Attend
    keys: list[Tensor | None]


class Transformer(HubModel, nn.Module):
    """The generator: labels and codes in, logits of the next codes and of the registers' targets out.

    Attributes:
        config: :class:`ModelConfig`.
        flex: a :class:`~mutor_img.attention.FlexAttention` that training on GPUs sets; None: SDPA.
        objective: the :class:`~mutor_img.objectives.objective.Objective` that training hangs on, with weights of its
            own or none; None: nothing of the kind.
        drop_inputs: what drops inputs, :func:`~mutor_img.common.dropout.dropout`; training on GPUs replaces it by a
            compiled one.
        keys: of the masks of dropout, while a forward pass that was given some is under way; else None.
    """

    loader = "mutor_img.checkpoints.loading", "load_checkpoint"
    drop_inputs = staticmethod(dropout)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.flex: FlexAttention | None = None
        self.objective: nn.Module | None = None
        self.keys: Tensor | None = None
        self.cls_embedding = LabelEmbedding(config.classes, config.dim)
        self.tok_embeddings = nn.Embedding(config.vocabulary, config.dim)
        if config.register_offsets is not None:
            self.register_embedding = nn.Embedding(max(1, len(config.register_offsets)), config.dim)
        self.rope = RotaryTable(config.grid, config.dim // config.heads)
        last = max(1, config.layers - 1)
        self.layers = nn.ModuleList(Block(config, config.drop_path * i / last) for i in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.output = Linear(config.dim, config.vocabulary)
        self.initialise()

    def initialise(self) -> None:
        """Draw all weights from torch's current generator.

        ========================================  ====================================
        linear layers and embeddings              N(0, 0.02)
        output head                               0: the first loss is ln(vocabulary)
        norms                                     1
        ========================================  ====================================
        """
        draw_weights(self)
        nn.init.zeros_(self.output.weight)

    def forward(self, labels: Tensor | None = None, codes: Tensor | None = None, anchors: Tensor | None = None,
                offsets: Tensor | None = None, *, within: Callable[[Transformer], T] | None = None,
                keys: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor] | T:
        """Return logits of the next codes and, with registers, of the registers' targets.

        Args:
            labels: (B,) int64 in 0 .. classes; ``classes`` is the null class.
            codes: (B, S - 1) int64, x_1 .. x_{S-1}, S <= N; with registers S = N.
            anchors, offsets: (B, R) int64 of the registers, in any order.
            within: a function of this model, to compute something else from its parts: ``model(within=f)`` is
                ``f(model)``. Only while a model's forward pass runs are sharded weights whole.
            keys: (places, B, 2) int32, what :func:`~mutor_img.common.dropout.mask_keys` gives: with ``within``, in
                training mode, they decide what is dropped. None: torch's generator does.

        Returns:
            (B, S, V), or that and (B, R, V). Register rows without a target are unspecified. With ``within``, what
            that returns.

        Raises:
            ValueError: shapes that do not fit each other or the grid, or registers on a model without them.
        """
        if within is not None:
            self.keys = keys
            try:
                return within(self)
            finally:
                self.keys = None
        x = self.norm(self.run(labels, codes, anchors, offsets).states[self.config.layers])
        if anchors is None:
            return self.output(x)  # (B, S, V)
        regular, register = x.split([codes.shape[1] + 1, anchors.shape[1]], dim=1)
        # Two products, not one that is cut: slices of logits are copied, forward and backward, and logits are large.
        return self.output(regular), self.output(register)

    def run(self, labels: Tensor, codes: Tensor, anchors: Tensor | None = None, offsets: Tensor | None = None,
            taps: Sequence[int] = ()) -> Run:
        """Send sequences through the blocks, up to the last one that is asked for.

        Args:
            labels, codes, anchors, offsets: as in :meth:`forward`.
            taps: after which blocks the residual stream is wanted, 0 .. L; () means the last, L.

        Raises:
            ValueError: as :meth:`forward`.
        """
        self._check(labels, codes, anchors, offsets)
        length = codes.shape[1] + 1
        x = torch.cat([self.cls_embedding(labels)[:, None], self.tok_embeddings(codes)], dim=1)  # (B, S, dim)
        rope = self.rope(torch.arange(length, device=codes.device))[None]  # (1, S, 2, head_dim)
        if anchors is not None:
            x = torch.cat([x, self._embed_registers(offsets)], dim=1)  # (B, S + R, dim)
            ids = register_ids(anchors, offsets, length)
            rope = torch.cat([rope.expand(len(x), -1, -1, -1), self.rope(ids)], dim=1)  # (B, S + R, ..)
        return self.through(x, rope, self._attend(length, anchors), taps)

    def through(self, x: Tensor, rope: Tensor, attend: Attend, taps: Sequence[int] = ()) -> Run:
        """Send embedded inputs through dropout and the blocks, up to the last one that is asked for.

        Args:
            x: (B, S, dim), S of any size.
            rope, attend: as in :class:`Run`.
            taps: as in :meth:`run`.
        """
        taps, (first, *keys) = taps or (self.config.layers,), self._keys_of_places(x)
        if first is not None:
            x = self.drop_inputs(x, first, self.config.dropout)
        states = {0: x} if 0 in taps else {}
        for number, (layer, its) in enumerate(islice(zip(self.layers, keys), max(taps)), start=1):
            x = layer(x, rope, attend, its)
            if number in taps:
                states[number] = x
        return Run(states, rope, attend, keys[self.config.layers:])

    @property
    def places(self) -> int:
        """How often something is dropped: of the inputs, then twice in each block, the objective's after the model's.
        """
        blocks = self.config.layers + (len(self.objective.blocks()) if self.objective is not None else 0)
        return 1 + 2 * blocks

    def _keys_of_places(self, x: Tensor) -> list[Tensor | None]:
        """Return keys for the dropout of inputs x, (B, S, 2), and for each block, (2, B, S, 2); or None for each."""
        if not self.training or not (self.config.dropout or self.config.drop_path):
            return [None] * (1 + self.places // 2)
        keys = self.keys
        if keys is None:
            keys = torch.randint(-2**31, 2**31, (self.places, len(x), 2), dtype=torch.int32, device=x.device)
        keys = row_keys(keys, *x.shape[1:])  # (places, B, S, 2)
        return [keys[0], *keys[1:].unflatten(0, (-1, 2))]

    def use_flex(self, anchors: Tensor, fixed: bool) -> None:
        """Attend with FlexAttention from now on, whenever registers are given (training on GPUs).

        Args:
            anchors: (B, R) int64; every later call has the same B and R.
            fixed: the anchors are the same in every sequence and call.
        """
        self.flex = FlexAttention(self.config.length, anchors, fixed)

    def _embed_registers(self, offsets: Tensor) -> Tensor:
        """Return (B, R, dim): the one shared vector, or the row of each offset."""
        return self.register_embedding(embedding_rows(offsets, self.config.register_offsets))

    def _attend(self, length: int, anchors: Tensor | None) -> Attend:
        if anchors is None or self.flex is None:
            return SdpaAttention(length, anchors)
        self.flex.update(anchors)
        return self.flex

    def _check(self, labels: Tensor, codes: Tensor, anchors: Tensor | None, offsets: Tensor | None) -> None:
        n = self.config.length
        if labels.dim() != 1 or codes.dim() != 2 or len(labels) != len(codes) or codes.shape[1] > n - 1:
            raise ValueError(f"labels {tuple(labels.shape)} and codes {tuple(codes.shape)} must be (B,) and (B, S - 1) "
                             f"with S <= {n}")
        if (anchors is None) != (offsets is None):
            raise ValueError("give anchors and offsets together, or neither")
        if anchors is None:
            return
        if self.config.register_offsets is None:
            raise ValueError("this model has no register embedding; build it with register_offsets=()")
        if anchors.dim() != 2 or anchors.shape != offsets.shape or len(anchors) != len(labels):
            raise ValueError(f"anchors {tuple(anchors.shape)} and offsets {tuple(offsets.shape)} must both be (B, R)")
        if codes.shape[1] != n - 1:
            raise ValueError(f"registers need whole sequences: codes must be (B, {n - 1}), not {tuple(codes.shape)}")

    def forward_flops(self, length: int, registers: int = 0, pairs: float | None = None) -> float:
        """Return the FLOPs of one sequence's forward pass: matrix products, and attention over visible pairs only.

        Args:
            length: regular inputs.
            registers: registers.
            pairs: query-key pairs that the rule allows; None: ``length (length + 1) / 2`` and no registers.
        """
        pairs = length * (length + 1) / 2 if pairs is None else pairs
        return model_flops(self.config, length + registers, pairs)

    def parameter_count(self) -> int:
        """Return the number of trained parameters."""
        return sum(math.prod(p.shape) for p in self.parameters())


def sampled_weights(weights: Mapping[str, T]) -> dict[str, T]:
    """Return a state dict without the weights that only training used: those whose names begin with ``objective.``."""
    return {name: weight for name, weight in weights.items() if not name.startswith("objective.")}
