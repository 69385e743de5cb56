"""The transformer one position at a time on GPUs: one step, compiled once and replayed as a CUDA graph.

A CUDA graph replays fixed kernels on fixed addresses. So the position is a tensor, attention masks a cache of the
full length, and weights and cache are parameters and buffers of one module: the compiler takes those for static, and
neither copies them at each step nor refuses to change them. Each number of rows is a graph of its own, and compiling
one takes long: so there are few, and others are padded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutor_img.blocks import Block
from mutor_img.transformer import Transformer

MOST_ROWS = 512  # sequences that samplers hand over at a time: each further number is one more graph to compile


class StaticCache(nn.Module):
    """One layer's keys and values of all slots, (R, H, slots, head dim) each."""

    def __init__(self, rows: int, heads: int, slots: int, head_dim: int, like: Tensor):
        super().__init__()
        for name in ("keys", "values"):
            empty = torch.zeros(rows, heads, slots, head_dim, device=like.device, dtype=like.dtype)
            self.register_buffer(name, empty, persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, where: tuple, mask: Tensor) -> Tensor:
        """Keep keys and values, and attend to all that the mask allows.

        Args:
            q: (R, H, S, head dim).
            k, v: as they stand at ``keys[where]``.
            where: an index of the slots that are written.
            mask: bool, broadcast to (R, 1, S, slots).

        Returns:
            (R, H, S, head dim).
        """
        self.keys[where] = k
        self.values[where] = v
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)


class StaticDecoder(nn.Module):
    """A transformer's own modules over a static cache; on CPUs: :class:`~mutor_img.decoding.cpu.PackedDecoder`.

    The weights are the model's, not copies, and the modules must be in eval mode while it runs. It does not hold the
    transformer itself, so that a decoder kept beside a model does not keep the model alive.

    Attributes:
        rows: sequences that the cache is for. A step takes so many or fewer and is padded.
    """

    def __init__(self, model: Transformer, rows: int, eager: bool = False, spare: int = 0):
        """Allocate the cache for ``rows`` sequences; the step is compiled when it is first called, or never.

        ``spare`` is the number of slots after those of the grid.
        """
        super().__init__()
        config, like = model.config, model.output.weight
        self.rows = rows
        self.tok_embeddings, self.rope = model.tok_embeddings, model.rope
        self.layers, self.norm, self.output = model.layers, model.norm, model.output
        slots = config.length + spare
        self.caches = nn.ModuleList(
            StaticCache(rows, config.heads, slots, config.dim // config.heads, like) for _ in model.layers)
        self.register_buffer("places", torch.arange(slots, device=like.device), persistent=False)
        self.position = torch.zeros(1, dtype=torch.int64, device=like.device)  # an argument of the step
        self.compiled = _step if eager else None

    def forward(self, codes: Tensor, position: Tensor) -> Tensor:
        """Return logits (rows, V) of x_{t+1} for codes x_t (rows,) int64 at position t (1,) int64: what is compiled."""
        return self._one(self.tok_embeddings(codes), position)

    def first(self, classes: Tensor) -> Tensor:
        """Start sequences: class embeddings (R, dim) -> logits (R, V) of the first code."""
        x = self._pad(classes)  # (rows, dim)
        return self._one(x, self.position.zero_())[: len(classes)]  # once per image: not worth a graph

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
        """Return (R, ..) as the first of (rows, ..); no sequence sees another one, so that zeros will do."""
        return torch.cat([numbers, numbers.new_zeros(self.rows - len(numbers), *numbers.shape[1:])])

    def _one(self, x: Tensor, position: Tensor) -> Tensor:
        mask = (self.places <= position)[None, None, None]  # (1, 1, 1, N)

        def attend(cache: StaticCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return cache.attend(q, k, v, (slice(None), slice(None), position), mask)

        return self._run(x[:, None], self.rope(position)[None], attend)[:, 0]  # (rows, V)

    def _run(self, x: Tensor, rope: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Return logits (rows, S, V) of embedded inputs (rows, S, dim); ``attend`` takes a layer's cache, q, k, v."""
        for layer, cache in zip(self.layers, self.caches):
            x = Block.forward(layer, x, rope, partial(attend, cache))  # the class's: training may have compiled its own
        return self.output(self.norm(x))


class StaticWindow(StaticDecoder):
    """Passes over a window of drafts: W regular inputs and R registers of each sequence, each sequence at its place.

    A slot after the grid's takes what rows past its end write, and each register has one more for itself.
    """

    def __init__(self, model: Transformer, rows: int, width: int, registers: int, eager: bool = False):
        """Allocate the cache for ``rows`` sequences, for windows of ``width`` inputs and so many registers."""
        super().__init__(model, rows, eager, spare=1 + registers)
        self.length, self.width = model.config.length, width
        device = self.places.device
        self.register_buffer("offsets", torch.arange(width + registers, device=device), persistent=False)
        self.register_buffer("sequences", torch.arange(rows, device=device)[:, None], persistent=False)

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        """Return logits (rows, S, V) for embedded inputs (rows, S, dim) of windows at ``start`` (rows,) int64."""
        places = start[:, None] + self.offsets  # (rows, S)
        seen = torch.minimum(places, start[:, None] + self.width - 1)  # the last slot of the window that a row sees
        own = torch.where(self.offsets < self.width, places.clamp(max=self.length),
                          self.length + 1 + self.offsets - self.width)  # the slot that it writes, and sees as well
        mask = (self.places <= seen[..., None]) | (self.places == own[..., None])  # (rows, S, slots)

        def attend(cache: StaticCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            where = self.sequences, slice(None), own  # (rows, S, H, head dim)
            return cache.attend(q, k.transpose(1, 2), v.transpose(1, 2), where, mask[:, None])

        return self._run(x, self.rope(places.clamp(max=self.length - 1)), attend)

    def window(self, x: Tensor, start: Tensor, width: int) -> Tensor:
        """Return logits (Q, S, V); see :class:`~mutor_img.decoding.drafting.WindowDecoder`."""
        if width != self.width or x.shape[1] != len(self.offsets):
            raise ValueError(f"a window of {width} of {x.shape[1]} rows; this decoder is for {self.width} of "
                             f"{len(self.offsets)}")
        if self.compiled is None:
            self.compile_step(mode="reduce-overhead")
        torch.compiler.cudagraph_mark_step_begin()  # the logits of the pass before are done with
        starts = self._pad(start.repeat_interleave(len(x) // len(start)))
        return self.compiled(self, self._pad(x), starts)[: len(x)]


def _step(decoder: StaticDecoder, inputs: Tensor, places: Tensor) -> Tensor:
    return decoder.forward(inputs, places)


_DECODERS: WeakKeyDictionary[Transformer, tuple[list, dict[tuple, StaticDecoder]]] = WeakKeyDictionary()


def static_decoder(model: Transformer, rows: int, window: tuple[int, int] | None = None,
                   eager: bool = False) -> StaticDecoder:
    """Return a decoder of at least ``rows`` sequences, the one of an earlier call where it still fits.

    ``window`` asks for a :class:`StaticWindow` of its regular inputs and registers. An eager one is for exactly so many
    sequences, and neither compiled nor kept.

    Its rows are a power of two, so that all numbers from 1 to 64 make seven graphs. A model keeps one decoder of each,
    compiled: their caches together are less than twice that of the largest, and so are those of each window. Weights
    that change in place need no new ones.
    """
    def build(rows: int) -> StaticDecoder:
        return StaticWindow(model, rows, *window, eager) if window else StaticDecoder(model, rows, eager)

    if eager:
        return build(rows)
    rows = 1 << (rows - 1).bit_length()
    state = [(weight.data_ptr(), weight.dtype) for weight in model.parameters()]
    kept = _DECODERS.get(model)
    if kept is None or kept[0] != state:
        _DECODERS.pop(model, None)  # the old caches go before a new one comes
        kept = _DECODERS[model] = state, {}
    if (rows, window) not in kept[1]:
        kept[1][rows, window] = build(rows)
    return kept[1][rows, window]
