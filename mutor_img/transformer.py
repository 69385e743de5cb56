"""The class-conditional transformer over VQ codes: LlamaGen's architecture (arXiv 2406.06525) with registers.

State-dict names and rounding are those of the released LlamaGen weights, so that these load without renaming; MuToR
adds ``register_embedding.weight``. The model knows nothing of files, devices or parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn

from mutor_img.attention import FlexAttention, SdpaAttention
from mutor_img.chunked_loss import chunked_cross_entropy_sum
from mutor_img.common.errors import UserError, suggest
from mutor_img.registers import cross_entropy_sum, embedding_rows, register_ids, register_targets

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

PRESETS = {  # layers, heads, dim
    "mnist": (6, 3, 192),
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "3B": (24, 32, 3200),
}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shapes of a :class:`Transformer`, and its dropout rates.

    Attributes:
        layers, heads, dim: size; :meth:`preset` gives the named ones.
        grid: rows and columns of codes.
        vocabulary: number of codes.
        classes: number of classes; one more embedding row is the null class.
        dropout: on the embedded sequence, and after attention and feed-forward.
        drop_path: stochastic depth of the last block, growing linearly; > 0 switches the latter two dropouts off.
        register_offsets: None: no registers. (): one embedding for all. Else one embedding for each of these offsets.
    """

    layers: int
    heads: int
    dim: int
    grid: tuple[int, int] = (16, 16)
    vocabulary: int = 16384
    classes: int = 1000
    dropout: float = 0.1
    drop_path: float = 0.0
    register_offsets: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.dim % self.heads or (self.dim // self.heads) % 4:
            raise UserError(f"dim {self.dim} over {self.heads} heads: the head dimension must be a multiple of 4")

    @classmethod
    def preset(cls, name: str, **others: Any) -> ModelConfig:
        """Return a named size with the other fields given."""
        if name not in PRESETS:
            raise UserError(f"model.preset is {name!r}{suggest(name, PRESETS)}")
        return cls(*PRESETS[name], **others)

    @property
    def length(self) -> int:
        """N, the codes of an image and the regular inputs of a sequence."""
        return self.grid[0] * self.grid[1]

    @property
    def hidden(self) -> int:
        """SwiGLU's inner width: 8 dim / 3 rounded up to a multiple of 256."""
        return -(-int(8 * self.dim / 3) // 256) * 256

    def to_json(self) -> dict[str, Any]:
        """Return the constructor's arguments, as a checkpoint's JSON holds them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from :meth:`to_json`'s output after a trip through JSON (lists for tuples)."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class RMSNorm(nn.Module):
    """Root-mean-square norm, eps 1e-5: fp32 inside, cast back, then the weight."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class RotaryTable(nn.Module):
    """2D rotary positions: cos and sin by position id, (N + 1, 2, head_dim / 2) fp32, base 10000.

    Row i >= 1 is grid cell i - 1: the first half of a head turns by the cell's row, the second by its column. Row 0,
    the class token's, is zero for cos and for sin, as in the released weights: its query and key vanish, every query
    gives it logit 0, and only its value flows.
    """

    def __init__(self, grid: tuple[int, int], head_dim: int):
        super().__init__()
        self.grid, self.head_dim = grid, head_dim
        self.register_buffer("table", self.compute(), persistent=False)

    def compute(self, device: torch.device | None = None) -> Tensor:
        """Return the table."""
        half = self.head_dim // 2
        frequencies = 10000.0 ** (-torch.arange(0, half, 2, device=device).float() / half)  # (head_dim / 4,)
        rows, columns = (torch.arange(n, device=device).float()[:, None] * frequencies for n in self.grid)
        angles = torch.cat(
            [rows[:, None].expand(-1, self.grid[1], -1), columns[None].expand(self.grid[0], -1, -1)], dim=-1
        ).flatten(0, 1)  # (N, head_dim / 2)
        cells = torch.stack([angles.cos(), angles.sin()], dim=1)  # (N, 2, head_dim / 2)
        return torch.cat([torch.zeros_like(cells[:1]), cells])

    def _apply(self, fn, recurse=True):
        before = self.table.device
        super()._apply(fn, recurse)
        if self.table.dtype != torch.float32 or before.type == "meta":
            self.table = self.compute(self.table.device)  # neither rounded by .to() nor blank after to_empty()
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """Look ids (..., S) up; returns (..., S, 2, head_dim / 2)."""
        return self.table[ids]


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of x (B, S, ..., H, head_dim) by rope (1 or B, S, 2, head_dim / 2), in fp32."""
    rope = rope.reshape(*rope.shape[:2], *(1,) * (x.dim() - 3), 2, -1)
    cos, sin = rope.unbind(-2)  # (1 or B, S, 1.., head_dim / 2)
    a, b = rearrange(x.float(), "... (i two) -> two ... i", two=2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Multi-head attention; who sees whom is the caller's ``attend``."""

    def __init__(self, config: ModelConfig, dropout: float):
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)  # rows: q, k, v
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        qkv = rearrange(self.wqkv(x), "b s (three h d) -> b s three h d", three=3, h=self.heads)
        q, k = rotate(qkv[:, :, :2], rope).transpose(1, 3).unbind(2)  # (B, H, S, head_dim) each
        out = attend(q, k, qkv[:, :, 2].transpose(1, 2))  # (B, H, S, head_dim)
        return self.dropout(self.wo(rearrange(out, "b h s d -> b s (h d)")))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * (w3 x))."""

    def __init__(self, config: ModelConfig, dropout: float):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, config: ModelConfig, drop_path: float):
        super().__init__()
        dropout = 0.0 if config.drop_path > 0 else config.dropout
        self.attention = Attention(config, dropout)
        self.feed_forward = FeedForward(config, dropout)
        self.attention_norm = RMSNorm(config.dim)
        self.ffn_norm = RMSNorm(config.dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        x = x + self.drop_path(self.attention(self.attention_norm(x), rope, attend))
        return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))


class LabelEmbedding(nn.Module):
    """Class embedding with a last row for the null class of classifier-free guidance."""

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Transformer(nn.Module):
    """The generator: labels and codes in, logits of the next codes and of the registers' targets out.

    Attributes:
        config: :class:`ModelConfig`.
        flex: a :class:`~mutor_img.attention.FlexAttention` that training on GPUs sets; None: SDPA.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.flex: FlexAttention | None = None
        self.cls_embedding = LabelEmbedding(config.classes, config.dim)
        self.tok_embeddings = nn.Embedding(config.vocabulary, config.dim)
        if config.register_offsets is not None:
            self.register_embedding = nn.Embedding(max(1, len(config.register_offsets)), config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.rope = RotaryTable(config.grid, config.dim // config.heads)
        last = max(1, config.layers - 1)
        self.layers = nn.ModuleList(Block(config, config.drop_path * i / last) for i in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.output = nn.Linear(config.dim, config.vocabulary, bias=False)
        self.initialise()

    def initialise(self) -> None:
        """Draw all weights from torch's current generator.

        ========================================  ====================================
        linear layers and embeddings              N(0, 0.02)
        output head                               0: the first loss is ln(vocabulary)
        norms                                     1
        ========================================  ====================================
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def forward(self, labels: Tensor, codes: Tensor, anchors: Tensor | None = None, offsets: Tensor | None = None,
                targets: Tensor | None = None, loss_chunk: int = 0) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits of the next codes and, with registers, of the registers' targets.

        Args:
            labels: (B,) int64 in 0 .. classes; ``classes`` is the null class.
            codes: (B, S - 1) int64, x_1 .. x_{S-1}, S <= N; with registers S = N.
            anchors, offsets: (B, R) int64 of the registers, in any order.
            targets: (B, S) int64, x_1 .. x_S; with them, losses come back in place of logits.
            loss_chunk: for losses, the most rows of logits at a time; 0: all of them.

        Returns:
            (B, S, V), or that and (B, R, V). Register rows without a target are unspecified. With ``targets`` the
            cross-entropy summed over the regular inputs, or that and the registers' sum: fp32 scalars.

        Raises:
            ValueError: shapes that do not fit each other or the grid, or registers on a model without them.
        """
        self._check(labels, codes, anchors, offsets)
        length = codes.shape[1] + 1
        x = torch.cat([self.cls_embedding(labels)[:, None], self.tok_embeddings(codes)], dim=1)  # (B, S, dim)
        rope = self.rope(torch.arange(length, device=codes.device))[None]  # (1, S, 2, head_dim / 2)
        if anchors is not None:
            x = torch.cat([x, self._embed_registers(offsets)], dim=1)  # (B, S + R, dim)
            ids = register_ids(anchors, offsets, length)
            rope = torch.cat([rope.expand(len(x), -1, -1, -1), self.rope(ids)], dim=1)  # (B, S + R, ..)
        attend = self._attend(length, anchors)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, rope, attend)
        x = self.norm(x)
        if anchors is None:
            return self._read(x, targets, loss_chunk)  # (B, S, V) or a scalar
        regular, register = x.split([length, anchors.shape[1]], dim=1)
        register_wanted = None if targets is None else register_targets(targets, anchors, offsets)
        # Two products, not one that is cut: slices of logits are copied, forward and backward, and logits are large.
        return self._read(regular, targets, loss_chunk), self._read(register, register_wanted, loss_chunk)

    def _read(self, x: Tensor, targets: Tensor | None, loss_chunk: int) -> Tensor:
        """Return x's logits or, given targets, their loss: a sharded head is whole only while forward runs."""
        if targets is not None and loss_chunk:
            return chunked_cross_entropy_sum(x, self.output.weight, targets, loss_chunk)
        return self.output(x) if targets is None else cross_entropy_sum(self.output(x), targets)

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
        c = self.config
        pairs = length * (length + 1) / 2 if pairs is None else pairs
        weights = c.layers * (4 * c.dim**2 + 3 * c.dim * c.hidden) + c.dim * c.vocabulary
        return 2.0 * weights * (length + registers) + 4.0 * c.layers * c.dim * pairs

    def parameter_count(self) -> int:
        """Return the number of trained parameters."""
        return sum(math.prod(p.shape) for p in self.parameters())
