"""What the transformer is made of: its sizes, norms, rotary positions, attention and feed-forward.

State-dict names and rounding are those of LlamaGen's released weights (arXiv 2406.06525).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mutor_img.common.dropout import dropout
from mutor_img.common.errors import UserError, check_choice, check_range
from mutor_img.common.linear import Linear

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

LLAMAGEN_PRESETS = {  # layers, heads, dim
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "3B": (24, 32, 3200),
}
PRESETS = {"tiny": (6, 3, 96), "mnist": (6, 2, 128), **LLAMAGEN_PRESETS}


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
        qk_norm: each head's queries and keys are normalised before they are turned (arXiv 2302.05442, there with
            LayerNorm). LlamaGen's weights have no such norms.
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
    qk_norm: bool = False

    def __post_init__(self):
        if self.dim % self.heads or (self.dim // self.heads) % 4:
            raise UserError(f"dim {self.dim} over {self.heads} heads: the head dimension must be a multiple of 4")
        for name in ("dropout", "drop_path"):
            check_range(f"model.{name}", getattr(self, name), 0.0, 0.99)

    @classmethod
    def preset(cls, name: str, **others: Any) -> ModelConfig:
        """Return a named size with the other fields given."""
        check_choice("model.preset", name, PRESETS)
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
        """Normalise x (..., dim) of any float dtype; what comes back is of x's dtype, or of the weight's if wider."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class RotaryTable(nn.Module):
    """2D rotary positions: cos and sin by position id, (N + 1, 2, head_dim) fp32, base 10000.

    Both numbers of a pair have theirs, as :func:`rotate` reads them: cos twice, and sin with minus for the first.

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
        cos, sin = angles.cos(), angles.sin()
        cells = torch.stack([cos, cos, -sin, sin], dim=-1).unflatten(-1, (2, 2)).transpose(1, 2).flatten(2)
        return torch.cat([torch.zeros_like(cells[:1]), cells])  # (N + 1, 2, head_dim)

    def factors(self) -> Tensor:
        """Return cos and sin of each pair once, (N + 1, head_dim / 2, 2) fp32, as LlamaGen's files hold them."""
        return self.table[..., 1::2].transpose(1, 2).contiguous()

    def _apply(self, fn, recurse=True):
        before = self.table.device
        super()._apply(fn, recurse)
        if self.table.dtype != torch.float32 or before.type == "meta":
            self.table = self.compute(self.table.device)  # neither rounded by .to() nor blank after to_empty()
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """Look ids (..., S) up; returns (..., S, 2, head_dim)."""
        return self.table[ids]


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of x (B, S, ..., head_dim) by rope (1 or B, S, 2, head_dim), in fp32."""
    rope = rope.reshape(*rope.shape[:2], *(1,) * (x.dim() - 3), 2, -1)
    cos, sin = rope.unbind(-2)  # (1 or B, S, 1.., head_dim)
    wide = x.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (2i + 1, 2i)
    return (wide * cos + swapped * sin).type_as(x)


class Attention(nn.Module):
    """Multi-head attention; who sees whom is the caller's ``attend``."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.wqkv = Linear(config.dim, 3 * config.dim)  # rows: q, k, v
        self.wo = Linear(config.dim, config.dim)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(config.dim // config.heads) for _ in range(2))

    def forward(self, x: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        """Return what attention adds to x.

        Args:
            x: (B, S, dim), normalised.
            rope: (1 or B, S, 2, head_dim) fp32, as :class:`RotaryTable` gives it.
            attend: takes q, k and v (B, H, S, head_dim) and returns the same shape.

        Returns:
            (B, S, dim).
        """
        q, k, v = rearrange(self.wqkv(x), "b s (three h d) -> three b s h d", three=3, h=self.heads)
        if self.q_norm is not None:
            q, k = self.q_norm(q).type_as(v), self.k_norm(k).type_as(v)
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, rope), rotate(k, rope), v))
        out = attend(q, k, v)  # (B, H, S, head_dim) each
        return self.wo(rearrange(out, "b h s d -> b s (h d)"))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * (w3 x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden)
        self.w3 = Linear(config.dim, config.hidden)
        self.w2 = Linear(config.hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the feed-forward adds to x (..., dim), which is normalised; the same shape."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """A pre-norm block: attention, then feed-forward, each added to what it reads.

    What they add is dropped in part, or with ``config.drop_path`` in whole, where :meth:`forward` is given keys.
    """

    def __init__(self, config: ModelConfig, drop_path: float):
        super().__init__()
        self.whole = config.drop_path > 0
        self.rate = drop_path if self.whole else config.dropout
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim)
        self.ffn_norm = RMSNorm(config.dim)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend, keys: Tensor | None = None) -> Tensor:
        """Return the residual stream x (B, S, dim) after this block.

        Args:
            x, rope, attend: as for :meth:`Attention.forward`.
            keys: (2, B, S, 2) int32, which decide what is dropped of attention's part and of the feed-forward's; None:
                nothing is.
        """
        first, second = (None, None) if keys is None else keys
        added = self.attention(self.attention_norm(x), rope, attend)
        x = x + dropout(added, first, self.rate, self.whole)
        return x + dropout(self.feed_forward(self.ffn_norm(x)), second, self.rate, self.whole)


class LabelEmbedding(nn.Module):
    """Class embedding with a last row for the null class of classifier-free guidance."""

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        """Embed labels (B,) int64 in 0 .. classes, the last being the null class; returns (B, dim)."""
        return self.embedding_table(labels)


def draw_weights(module: nn.Module) -> None:
    """Draw a module's linear layers and embeddings from N(0, 0.02), by torch's current generator; biases are 0."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def block_weights(config: ModelConfig) -> int:
    """Return the weights of one block's matrices."""
    return 4 * config.dim**2 + 3 * config.dim * config.hidden


def block_flops(config: ModelConfig, tokens: float, pairs: float) -> float:
    """Return the FLOPs of one block's forward pass over a sequence: matrix products, and attention.

    Args:
        config: the model's sizes.
        tokens: inputs of the sequence.
        pairs: query-key pairs that may attend.
    """
    return 2.0 * block_weights(config) * tokens + 4.0 * config.dim * pairs


def model_flops(config: ModelConfig, tokens: float, pairs: float) -> float:
    """Return the FLOPs of a whole model's forward pass over a sequence, logits of every input included."""
    return config.layers * block_flops(config, tokens, pairs) + 2.0 * config.dim * config.vocabulary * tokens
