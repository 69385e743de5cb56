"""A class-conditional transformer, its training step and its sampler as public code has them, to measure ours against.

Written from the published description (arXiv 2406.06525) in plain PyTorch, without this project's modules: rotations
in fp32 as real numbers, weights of w1 and w3 apart, whole logits in fp32, PyTorch's own dropout, cross-entropy and
fused AdamW; when sampling, a cache of the full length with a mask, attention without fused kernels, softmax and
multinomial at each step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Cache = tuple[Tensor, Tensor]  # keys and values, (rows, heads, slots, head dim) each


class _Norm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm, self.ffn_norm = _Norm(dim), _Norm(dim)
        self.wqkv, self.wo = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor | None, at: Tensor | None, cache: Cache | None) -> Tensor:
        """Return (rows, S, dim) of x (rows, S, dim); ``turns`` (S, head dim / 2, 2), ``mask`` (rows, 1, S, slots)."""
        rows, length, dim = x.shape
        split = (rows, length, self.heads, dim // self.heads)
        q, k, v = (part.view(split) for part in self.wqkv(self.attention_norm(x)).chunk(3, dim=-1))
        q, k, v = (part.transpose(1, 2) for part in (_turn(q, turns), _turn(k, turns), v))  # (rows, heads, S, head dim)
        if cache is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            keys, values = cache
            keys[:, :, at], values[:, :, at] = k, v
            keys, values = keys.repeat_interleave(1, dim=1), values.repeat_interleave(1, dim=1)  # of grouped heads
            with sdpa_kernel(SDPBackend.MATH):
                out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        out = self.wo(out.transpose(1, 2).contiguous().view(rows, length, dim))
        x = x + F.dropout(out, self.dropout, self.training)
        normed = self.ffn_norm(x)
        out = self.w2(F.silu(self.w1(normed)) * self.w3(normed))
        return x + F.dropout(out, self.dropout, self.training)


def _turn(x: Tensor, turns: Tensor) -> Tensor:
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)  # (rows, S, heads, head dim / 2, 2)
    cos, sin = turns[:, None].unbind(-1)  # (S, 1, head dim / 2) each
    turned = (pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin)
    return torch.stack(turned, dim=-1).flatten(3).type_as(x)


class PublicTransformer(nn.Module):
    """The model. N codes stand on a square grid; position 0 is the class.

    Args:
        layers, heads, dim, hidden: the shapes of the blocks.
        side: rows and columns of codes.
        vocabulary, classes: numbers of codes and of classes.
        dropout: in training; 0.1 as published.
    """

    def __init__(self, layers: int, heads: int, dim: int, hidden: int, side: int, vocabulary: int, classes: int,
                 dropout: float = 0.1):
        super().__init__()
        self.classes, self.length, self.dropout = classes, side * side, dropout
        self.class_table, self.code_table = nn.Embedding(classes + 1, dim), nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(_Block(dim, heads, hidden, dropout) for _ in range(layers))
        self.norm, self.output = _Norm(dim), nn.Linear(dim, vocabulary, bias=False)
        for weight in (module.weight for module in self.modules() if isinstance(module, (nn.Linear, nn.Embedding))):
            nn.init.normal_(weight, std=0.02)
        quarter = dim // heads // 4
        angles = torch.arange(side)[:, None] * 10000.0 ** (-torch.arange(quarter) / quarter)  # (side, head dim / 4)
        rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
        grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (N, head dim / 2)
        self.turns = torch.cat([torch.zeros(1, 2 * quarter, 2), torch.stack([grid.cos(), grid.sin()], dim=-1)])

    def forward(self, labels: Tensor, codes: Tensor) -> Tensor:
        """Return the mean loss of codes (B, N) int64 of classes (B,) int64; in training one label in ten is dropped."""
        if self.training:
            labels = torch.where(torch.rand(len(labels), device=labels.device) < 0.1, self.classes, labels)
        x = torch.cat([self.class_table(labels)[:, None], self.code_table(codes[:, :-1])], dim=1)  # (B, N, dim)
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, self.turns[: self.length].to(x.device), None, None, None)
        logits = self.output(self.norm(x)).float()  # (B, N, V)
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    @torch.no_grad()
    def generate(self, labels: Tensor, scale: float) -> Tensor:
        """Return sampled codes (B, N) int64 of classes (B,) int64, with guidance."""
        rows, slots = 2 * len(labels), -(-(self.length + 1) // 8) * 8
        weight, turns = self.output.weight, self.turns.to(labels.device)
        heads = self.layers[0].heads
        shape = (rows, heads, slots, weight.shape[1] // heads)
        caches = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.layers]
        visible = torch.ones(slots, slots, dtype=torch.bool, device=labels.device).tril().repeat(rows, 1, 1)
        x = self.class_table(torch.cat([labels, torch.full_like(labels, self.classes)]))[:, None]  # (2 B, 1, dim)
        position, codes, kept = torch.zeros(1, dtype=torch.int64, device=labels.device), [], []
        while True:
            for layer, cache in zip(self.layers, caches):
                x = layer(x, turns[position], visible[:, None, position], position, cache)
            conditional, unconditional = self.output(self.norm(x))[:, -1].float().chunk(2)  # (B, V) each
            kept.append((unconditional + (conditional - unconditional) * scale).softmax(-1))
            codes.append(torch.multinomial(kept[-1], 1))
            if len(codes) == self.length:
                return torch.cat(codes, 1)
            x, position = self.code_table(codes[-1].repeat(2, 1)), position + 1


def training_step(model: PublicTransformer, batch: int, bf16: bool) -> Callable[[], None]:
    """Return a function that does one update of the model on ``batch`` random sequences."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
                                  lr=1e-4, betas=(0.9, 0.95), fused=True)
    vocabulary = model.output.out_features

    def step() -> None:
        codes = torch.randint(vocabulary, (batch, model.length))
        labels = torch.randint(model.classes, (batch,))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(labels, codes)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
