"""The transformer one position at a time on GPUs: one step, compiled once and replayed as a CUDA graph.

A CUDA graph replays fixed kernels on fixed addresses. So the position is a tensor, attention masks a cache of the
full length, and weights and cache are parameters and buffers of one module: the compiler takes those for static, and
neither copies them at each step nor refuses to change them. Each number of rows is a graph of its own, and compiling
one takes long: so there are few, and others are padded.
"""

from __future__ import annotations

from types import FunctionType
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutor_img.transformer import Block, Transformer

MOST_ROWS = 512  # sequences that samplers hand over at a time: each further number is one more graph to compile


class StaticCache(nn.Module):
    """One layer's keys and values of all positions, (R, H, N, head dim) each."""

    def __init__(self, rows: int, heads: int, length: int, head_dim: int, like: Tensor):
        super().__init__()
        for name in ("keys", "values"):
            empty = torch.zeros(rows, heads, length, head_dim, device=like.device, dtype=like.dtype)
            self.register_buffer(name, empty, persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """Keep one position's keys and values, and attend to all so far.

        Args:
            q, k, v: (R, H, 1, head dim).
            position: (1,) int64.
            mask: (1, 1, 1, N) bool, True up to the position.

        Returns:
            (R, H, 1, head dim).
        """
        self.keys[:, :, position] = k
        self.values[:, :, position] = v
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)


class StaticDecoder(nn.Module):
    """A transformer's own modules over a static cache; on CPUs: :class:`~mutor_img.decoding.cpu.PackedDecoder`.

    The weights are the model's, not copies, and the modules must be in eval mode while it runs. It does not hold the
    transformer itself, so that a decoder kept beside a model does not keep the model alive.

    Attributes:
        rows: sequences that the cache is for. A step takes so many or fewer and is padded.
    """

    def __init__(self, model: Transformer, rows: int, eager: bool = False):
        """Allocate the cache for ``rows`` sequences; the step is compiled when it is first called, or never."""
        super().__init__()
        config, like = model.config, model.output.weight
        self.rows = rows
        self.cls_embedding, self.tok_embeddings, self.rope = model.cls_embedding, model.tok_embeddings, model.rope
        self.layers, self.norm, self.output = model.layers, model.norm, model.output
        self.caches = nn.ModuleList(
            StaticCache(rows, config.heads, config.length, config.dim // config.heads, like) for _ in model.layers)
        self.register_buffer("places", torch.arange(config.length, device=like.device), persistent=False)
        self.position = torch.zeros(1, dtype=torch.int64, device=like.device)  # an argument of the step
        self.compiled = _step if eager else None

    def forward(self, codes: Tensor, position: Tensor) -> Tensor:
        """Return logits (rows, V) of x_{t+1} for codes x_t (rows,) int64 at position t (1,) int64: what is compiled."""
        return self._run(self.tok_embeddings(codes), position)

    def first(self, labels: Tensor) -> Tensor:
        """Start sequences: labels (R,) int64 in 0 .. classes (the null class) -> logits (R, V) of the first code."""
        x = self.cls_embedding(self._pad(labels))  # (rows, dim)
        return self._run(x, self.position.zero_())[: len(labels)]  # once an image: not worth a graph

    def next(self, codes: Tensor, position: int) -> Tensor:
        """Go on: codes x_t (R,) int64 at position t -> logits (R, V) of x_{t+1}, overwritten by the next call."""
        if self.compiled is None:
            self.compile_step(mode="reduce-overhead")
        self.position.fill_(position)  # queued like a kernel: nothing waits for the device
        torch.compiler.cudagraph_mark_step_begin()  # the logits of the step before are done with
        return self.compiled(self, self._pad(codes), self.position)[: len(codes)]

    def compile_step(self, **options) -> None:
        """Compile :meth:`forward` as one graph of fixed shapes; ``options`` are torch.compile's.

        Torch counts compilations by code object, and ends with an error at the ninth: each decoder compiles a copy of
        the code. What it keeps is no method of its own: holding itself, it would outlive its last user, and the cache
        with it, until Python looks for such circles.
        """
        own = FunctionType(_step.__code__.replace(), globals())
        self.compiled = torch.compile(own, fullgraph=True, dynamic=False, **options)

    def _pad(self, numbers: Tensor) -> Tensor:
        """Return labels or codes (R,) as the first of (rows,); no sequence sees another one, so that zeros will do."""
        return F.pad(numbers, (0, self.rows - len(numbers)))

    def _run(self, x: Tensor, position: Tensor) -> Tensor:
        x, rope = x[:, None], self.rope(position)[None]  # (rows, 1, dim), (1, 1, 2, head dim / 2)
        mask = (self.places <= position)[None, None, None]  # (1, 1, 1, N)
        for layer, cache in zip(self.layers, self.caches):
            def attend(q: Tensor, k: Tensor, v: Tensor, cache: StaticCache = cache) -> Tensor:
                return cache.attend(q, k, v, position, mask)

            x = Block.forward(layer, x, rope, attend)  # the class's: training may have compiled the instance's
        return self.output(self.norm(x))[:, 0]  # (rows, V)


def _step(decoder: StaticDecoder, codes: Tensor, position: Tensor) -> Tensor:
    return decoder.forward(codes, position)


_DECODERS: WeakKeyDictionary[Transformer, tuple[list, dict[int, StaticDecoder]]] = WeakKeyDictionary()


def static_decoder(model: Transformer, rows: int) -> StaticDecoder:
    """Return a decoder of at least ``rows`` sequences, the one of an earlier call where it still fits.

    Its rows are a power of two, so that all numbers from 1 to 64 make seven graphs. A model keeps one decoder of each,
    compiled: their caches together are less than twice that of the largest. Weights that change in place need no new
    ones.
    """
    rows = 1 << (rows - 1).bit_length()
    state = [(weight.data_ptr(), weight.dtype) for weight in model.parameters()]
    kept = _DECODERS.get(model)
    if kept is None or kept[0] != state:
        _DECODERS.pop(model, None)  # the old caches go before a new one comes
        kept = _DECODERS[model] = state, {}
    if rows not in kept[1]:
        kept[1][rows] = StaticDecoder(model, rows)
    return kept[1][rows]
