"""The transformer one position at a time on CPUs: linear layers packed for the machine, and a cache read as a prefix.

:class:`PackedDecoder` computes what :class:`~mutor_img.transformer.Transformer` computes in eval mode, with the same
rounding, from the same weights. Regular inputs never see a register (method, section 2), so that registers play no part
but as drafts. On GPUs :class:`mutor_img.decoding.gpu.StaticDecoder` does it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from weakref import WeakKeyDictionary, finalize

import torch
import torch.nn.functional as F
from torch import Tensor

from mutor_img.blocks import Block
from mutor_img.transformer import Transformer

CHUNK = 8  # sequences the network runs on at least in fp32, padded; a bit of the result may depend on it
CHUNKS = 4, 64  # that run together at most: of any model, and of one whose cache then stays within CACHE
CACHE = 2**30  # bytes of keys and values
_PACK_ROWS = 32  # rows that oneDNN lays weights out for; the same layout serves from 8 to 64 as well


class PrefixCache:
    """Keys and values so far, read as slices up to the current position.

    One query per sequence makes attention a matter of memory and of dtype conversions. In bf16 a compiled kernel reads
    each key and value once, as they are; other dtypes take two batched products, a third faster than CPUs' fused
    attention, which is made for many queries. In fp32 nothing is compiled, so that bits do not hang on a compiler;
    without a C++ compiler bf16 takes the products, too, over a cache in fp32 (bf16 ones are slower still).
    """

    def __init__(self, layers: int, rows: int, heads: int, length: int, head_dim: int, like: Tensor):
        self.fused = _fuses(like.dtype)
        dtype = like.dtype if self.fused else torch.promote_types(like.dtype, torch.float32)
        # One place too many: a slice that were all of the cache would be compiled for anew, being contiguous.
        self.store = torch.zeros(layers, 2, rows, heads, length + 1, head_dim, device=like.device, dtype=dtype)

    def attend(self, layer: int, position: int, qkv: Tensor) -> Tensor:
        """Keep this position's keys and values and attend to all so far.

        Args:
            qkv: (R, 3, H, head dim); queries are scaled already.

        Returns:
            (R, H, head dim).
        """
        store = self.store[layer, :, : len(qkv)]  # (2, R, H, N, head dim)
        store[:, :, :, position] = qkv[:, 1:].transpose(0, 1)
        keys, values = store.flatten(1, 2)  # (R H, N, head dim) each
        return self._read(keys, values, position, qkv[:, 0].flatten(0, 1)[:, None]).view_as(qkv[:, 0])

    def take(self, other: PrefixCache, images: Tensor, slots: Tensor, halves: int, count: int, places: int) -> None:
        """Take over the first ``places`` of some images from the cache of windows, where the rows of an image are side
        by side; here they stand in ``slots`` of each half of ``count`` rows, (B,) int64 as ``images``.
        """
        theirs = other.store.unflatten(2, (-1, halves))[:, :, images, ..., :places, :]  # (L, 2, B, halves, H, M, ..)
        ours = self.store[:, :, : halves * count].unflatten(2, (halves, -1))
        ours[:, :, :, slots, :, :places] = theirs.transpose(2, 3)

    def attend_window(self, layer: int, starts: Sequence[int], width: int, qkv: Tensor) -> Tensor:
        """Keep the keys and values of a window, and attend to all before each of its rows and to the row itself.

        Each row is read by itself, exactly as :meth:`attend` reads it: batched products would sum in another order, and
        a code whose draw falls near an edge would flip. Registers, the rows after the first ``width``, take turns in
        the slot after the window.

        Args:
            starts: the place of the first row of each of B images; rows from the grid's end on are left out.
            qkv: (Q, S, 3, H, head dim) of Q sequences, those of an image side by side; queries are scaled already.

        Returns:
            (Q, S, H, head dim); zero for the rows left out.
        """
        out, halves, length = torch.zeros_like(qkv[:, :, 0]), len(qkv) // len(starts), self.store.shape[4] - 1
        for first, start in zip(range(0, len(qkv), halves), starts):
            image, store = qkv[first : first + halves], self.store[layer, :, first : first + halves]
            queries = image[:, :, 0].transpose(0, 1).flatten(1, 2)[:, :, None].unbind()  # S of (halves H, 1, head dim)
            keys, values = store.flatten(1, 2)  # (halves H, N, head dim) each
            keep = image[:, :, 1:].permute(2, 0, 3, 1, 4)  # (2, halves, H, S, head dim)
            end, rows = min(start + width, length), min(qkv.shape[1], length - start)
            store[:, :, :, start:end] = keep[:, :, :, : end - start]
            reads = []
            for row in range(rows):
                if row >= width:
                    store[:, :, :, end] = keep[:, :, :, row]
                reads.append(self._read(keys, values, min(start + row, end), queries[row]))
            if reads:  # none of an image that is finished
                read = torch.stack(reads).view(rows, halves, *qkv.shape[3:])
                out[first : first + halves, :rows] = read.transpose(0, 1)
        return out

    def _read(self, keys: Tensor, values: Tensor, position: int, queries: Tensor) -> Tensor:
        """Attend from one query each, (R H, 1, head dim), to the first places of keys and values (R H, N, head dim)."""
        if not position:
            return values[:, :1].to(queries.dtype)  # itself alone
        keys, values = keys.narrow(1, 0, position + 1), values.narrow(1, 0, position + 1)  # (R H, seen, head dim) each
        if self.fused:  # R * H, not R and H: a kernel would be compiled anew where one of them is 1
            return _compiled_attention()(queries[:, 0], keys, values)[:, None]
        scores = torch.bmm(queries.to(keys.dtype), keys.transpose(1, 2))  # (R H, 1, seen)
        return torch.bmm(scores.softmax(-1), values)


def _fuses(dtype: torch.dtype) -> bool:
    """Tell whether attention over a cache of that dtype is one compiled kernel: in bf16, with a C++ compiler."""
    return dtype == torch.bfloat16 and shutil.which(os.environ.get("CXX", "g++")) is not None


@cache
def _compiled_attention() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return :func:`_attention` compiled for any number of rows and positions; it compiles when it is first called."""
    return torch.compile(_attention, dynamic=True)


def _attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one query per head (.., D) over keys and values (.., seen, D), with fp32 sums: (.., D) fp32.

    Written as products and sums, which the compiler turns into loops without temporaries.
    """
    scores = (queries[..., None, :].float() * keys.float()).sum(-1)  # (.., seen)
    return (scores.softmax(-1)[..., None] * values.float()).sum(-2)


class Packed:
    """A linear layer without bias: x (R, in) -> (R, out), and what follows it in the same pass.

    The weight is reordered once for oneDNN, which is up to three times as fast as handing it over afresh at each of
    the hundreds of steps.
    """

    def __init__(self, weight: Tensor):
        """Take a weight (out, in)."""
        self.weight = weight.detach()
        self.packed = None
        if _onednn_takes(weight.dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), _PACK_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        return self._unary(x, "none") if self.packed is not None else F.linear(x, self.weight)

    def silu(self, x: Tensor) -> Tensor:
        """Return silu(x weight')."""
        return self._unary(x, "swish") if self.packed is not None else F.silu(F.linear(x, self.weight))

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """Return other * (x weight'); other is (R, out)."""
        return self._binary(x, other, "mul") if self.packed is not None else other * F.linear(x, self.weight)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """Return other + x weight'; other is (R, out)."""
        return self._binary(x, other, "add") if self.packed is not None else other + F.linear(x, self.weight)

    def _unary(self, x: Tensor, then: str) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, then, [], "")

    def _binary(self, x: Tensor, other: Tensor, how: str) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, None, how)


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of (R, dim), rounded as the module does: fp32 inside, cast back, then the weight (dim,)."""
    return F.rms_norm(x.float(), x.shape[-1:], None, 1e-5).type_as(x) * weight


class _Layer:
    """One block's weights."""

    def __init__(self, block: Block):
        attention, feed_forward = block.attention, block.feed_forward
        self.heads = attention.heads
        self.attention_norm, self.ffn_norm = block.attention_norm.weight.detach(), block.ffn_norm.weight.detach()
        self.qkv, self.out = Packed(attention.wqkv.weight), Packed(attention.wo.weight)
        self.head_norms = ([head_norm.weight.detach() for head_norm in (attention.q_norm, attention.k_norm)]
                           if attention.q_norm is not None else [])  # of q and k
        self.gate, self.up, self.down = (Packed(linear.weight)
                                         for linear in (feed_forward.w1, feed_forward.w3, feed_forward.w2))

    def forward(self, x: Tensor, rope: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the block's output (R, dim) for x (R, dim)."""
        qkv = self.qkv(norm(x, self.attention_norm)).unflatten(-1, (3, self.heads, -1))  # (R, 3, H, head dim)
        for place, weight in enumerate(self.head_norms):
            qkv[:, place] = norm(qkv[:, place], weight)
        qkv = qkv.float()
        torch.view_as_complex(qkv[:, :2].unflatten(-1, (-1, 2))).mul_(rope)  # pairs turn in place
        x = self.out.plus(attend(qkv).flatten(-2).type_as(x), x)
        y = norm(x, self.ffn_norm)
        return self.down.plus(self.up.times(y, self.gate.silu(y)), x)


class PackedTransformer:
    """A transformer's weights as they are now, laid out for decoding on a CPU: a second copy of the linear layers."""

    def __init__(self, model: Transformer):
        self.config = model.config
        self.codes = model.tok_embeddings.weight.detach()
        self.layers = [_Layer(block) for block in model.layers]
        self.norm, self.output = model.norm.weight.detach(), Packed(model.output.weight)
        self.spare: list[PrefixCache] = []  # of decoders that are gone, the last two, for the next ones
        scale = (self.config.dim // self.config.heads) ** -0.5
        turns = torch.view_as_complex(model.rope.factors())  # (N + 1, head_dim / 2)
        self.rope = torch.stack([turns * scale, turns], dim=1)[:, None, :, None]  # (N + 1, 1, 2, 1, ..): q, k
        self._independent: dict[tuple[int, int], bool] = {}  # what rows_are_independent has found, by threads and rows

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (R, V) of what the last layer gives, (R, dim)."""
        return self.output(norm(x, self.norm))

    def most_together(self, halves: int) -> int:
        """Return how many images may run together in fp32, with ``halves`` rows each: a multiple of ``CHUNK``.

        The more rows, the less the steps of a small model cost each; a large one has its cache to keep.
        """
        config, (any_model, most) = self.config, CHUNKS
        image = halves * 2 * config.layers * (config.length + 1) * config.dim * 4  # bytes
        return CHUNK * max(any_model, min(most, CACHE // (CHUNK * image)))

    def rows_are_independent(self, rows: int) -> bool:
        """Tell whether each row of a pass over so many gets the bits that it gets in one over ``CHUNK`` rows.

        How kernels sum may depend on the machine, on shapes and on threads. So a layer and the head are tried.
        """
        tried = torch.get_num_threads(), rows
        if tried not in self._independent:
            config, place, draw = self.config, self.config.length // 2, torch.Generator().manual_seed(0)
            whole = -(-rows // CHUNK) * CHUNK
            x = torch.randn(whole, config.dim, generator=draw).to(self.codes)
            cache = PrefixCache(1, whole, config.heads, place + 1, config.dim // config.heads, self.codes)
            cache.store.copy_(torch.randn(cache.store[:, :, :1].shape, generator=draw))  # the same for every row

            def logits(part: Tensor) -> Tensor:
                y = self.layers[0].forward(part, self.rope[place], lambda qkv: cache.attend(0, place, qkv))
                return self.logits(y)

            alone = torch.cat([logits(part) for part in x.split(CHUNK)])
            self._independent[tried] = torch.equal(logits(x[:rows]), alone[:rows])
        return self._independent[tried]


_PACKED: WeakKeyDictionary[Transformer, tuple[list, PackedTransformer]] = WeakKeyDictionary()


def pack(model: Transformer) -> PackedTransformer:
    """Return the packed weights of a model, the ones of the last call where no weight has changed since."""
    state = [_state(weight) for weight in model.parameters()]
    kept = _PACKED.get(model)
    if kept is None or kept[0] != state:
        _PACKED.pop(model, None)  # the old copy goes before the new one comes
        kept = _PACKED[model] = state, PackedTransformer(model)
    return kept[1]


def _state(weight: Tensor) -> tuple:
    """Return what changes when a weight does; its version alone misses writes through ``.data``."""
    flat = weight.detach().reshape(-1)
    whole = flat.view(torch.int64) if flat.numel() * flat.element_size() % 8 == 0 else flat.view(torch.uint8)
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, tuple(weight.shape), int(whole.sum())


def _put_back(spare: list[PrefixCache], cache: PrefixCache) -> None:
    """Keep a cache for the next decoder: allocating one afresh, and its page faults, would cost as much as a step."""
    spare.append(cache)
    del spare[:-2]


class PackedDecoder:
    """Decoding of up to ``rows`` sequences on a CPU.

    The next images need no clearing of the cache: nothing beyond the current position is read.

    Attributes:
        weights: the packed weights.
        rows: the most sequences that a step takes.
        cache: what attention has seen.
    """

    def __init__(self, weights: PackedTransformer, rows: int):
        """Take over the cache of a decoder of as many rows that is gone, or allocate one."""
        config = weights.config
        self.weights, self.rows = weights, rows
        wanted = rows, _fuses(weights.codes.dtype)
        fitting = next((cache for cache in weights.spare if (cache.store.shape[2], cache.fused) == wanted), None)
        if fitting is None:
            fitting = PrefixCache(config.layers, rows, config.heads, config.length, config.dim // config.heads,
                                  weights.codes)
        else:  # nobody else may have it at the same time
            weights.spare[:] = [cache for cache in weights.spare if cache is not fitting]
        self.cache = fitting
        finalize(self, _put_back, weights.spare, fitting)

    def first(self, classes: Tensor) -> Tensor:
        """Start sequences: class embeddings (R, dim) -> logits (R, V) of the first code."""
        return self.step(classes, 0)

    def next(self, codes: Tensor, position: int) -> Tensor:
        """Go on: codes x_t (R,) int64 at position t -> logits (R, V) of x_{t+1}."""
        return self.step(self.weights.codes[codes], position)

    def step(self, x: Tensor, position: int) -> Tensor:
        """Return the logits (R, V) at one position of R <= rows sequences whose earlier positions are cached.

        Args:
            x: (R, dim) embedded inputs.
            position: the position id, 0 .. N - 1.
        """
        rope = self.weights.rope[position]  # (1, 2, 1, head_dim / 2)
        for index, layer in enumerate(self.weights.layers):
            x = layer.forward(x, rope, lambda qkv, at=index: self.cache.attend(at, position, qkv))
        return self.weights.logits(x)

    def window(self, x: Tensor, start: Tensor, width: int) -> Tensor:
        """Return logits (Q, S, V) of a window; see :class:`~mutor_img.decoding.drafting.WindowDecoder`."""
        places = (start[:, None] + torch.arange(x.shape[1])).clamp(max=self.weights.config.length - 1)  # (B, S)
        rope = self.weights.rope[places.repeat_interleave(len(x) // len(start), 0).flatten(), 0]  # (Q S, 2, 1, ..)
        starts = start.tolist()

        def attend(qkv: Tensor, layer: int) -> Tensor:
            return self.cache.attend_window(layer, starts, width, qkv.unflatten(0, x.shape[:2])).flatten(0, 1)

        y = x.flatten(0, 1)  # (Q S, dim): the linear layers take all rows at once
        for index, layer in enumerate(self.weights.layers):
            y = layer.forward(y, rope, lambda qkv, at=index: attend(qkv, at))
        return self.weights.logits(y).unflatten(0, x.shape[:2])
