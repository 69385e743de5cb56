"""The transformer one position at a time, for sampling: a static cache, and linear layers packed for the machine.

:class:`Decoder` computes what :class:`~mutor_img.transformer.Transformer` computes in eval mode, with the same
rounding, from the same weights; registers play no part (method, section 2: regular inputs never see one).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mutor_img.transformer import Block, RMSNorm, Transformer

Linear = Callable[[Tensor], Tensor]


class PrefixCache:
    """Keys and values so far, read as slices up to the current position: the least memory traffic, for CPUs.

    One query a sequence makes attention a matter of memory and of dtype conversions, so the cache is at least fp32
    whatever the weights are: bf16 would be widened again at each step, which costs more than reading fp32.
    """

    def __init__(self, layers: int, rows: int, heads: int, length: int, head_dim: int, like: Tensor):
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.store = torch.zeros(layers, 2, rows, heads, length, head_dim, device=like.device, dtype=dtype)

    def attend(self, layer: int, position: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k and v of this position and attend to all so far; q, k, v and the result are (R, H, head dim)."""
        keys, values = self.store[layer, :, : len(q)].unbind(0)  # (R, H, N, head dim) each
        keys[:, :, position], values[:, :, position] = k, v
        seen = slice(0, position + 1)
        # Two batched products are a third faster here than CPUs' fused attention, which is made for many queries.
        query = (q.to(keys.dtype) * q.shape[-1] ** -0.5)[:, :, None]  # (R, H, 1, head dim)
        scores = torch.matmul(query, keys[:, :, seen].transpose(2, 3))  # (R, H, 1, seen)
        out = torch.matmul(scores.softmax(-1), values[:, :, seen])  # (R, H, 1, head dim)
        return out[:, :, 0].type_as(q)


class MaskedCache:
    """Keys and values with the position as a tensor: nothing changes shape, so that a CUDA graph can replay a step."""

    def __init__(self, layers: int, rows: int, heads: int, length: int, head_dim: int, like: Tensor):
        self.store = torch.zeros(layers, 2, rows, heads, length, head_dim, device=like.device, dtype=like.dtype)
        self.places = torch.arange(length, device=like.device)  # (N,)

    def attend(self, layer: int, position: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As :meth:`PrefixCache.attend`, with position (1,) int64."""
        keys, values = self.store[layer, :, : len(q)].unbind(0)  # (R, H, N, head dim) each
        keys.index_copy_(2, position, k[:, :, None])
        values.index_copy_(2, position, v[:, :, None])
        mask = (self.places <= position)[None, None, None]  # (1, 1, 1, N)
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask)[:, :, 0]


class Decoder:
    """A transformer's weights prepared for decoding ``rows`` sequences, and their cache.

    Weights are taken as they are now: make a new decoder after an update. A second image needs no clearing of the
    cache, since nothing beyond the current position is read.

    Attributes:
        model: the transformer.
        rows: most sequences a step takes.
        cache: what attention has seen.
    """

    def __init__(self, model: Transformer, rows: int, masked: bool = False):
        """Prepare.

        Args:
            model: the transformer; its dtype and device are those of decoding.
            rows: most sequences a step takes.
            masked: positions are tensors (:class:`MaskedCache`), not integers.
        """
        config, like = model.config, model.tok_embeddings.weight
        self.model, self.rows = model, rows
        self.layers = [_Layer(block, rows) for block in model.layers]
        self.output = pack(model.output.weight, rows)
        self.rope = torch.view_as_complex(model.rope.table.transpose(1, 2).contiguous())  # (N + 1, head_dim / 2)
        cache = MaskedCache if masked else PrefixCache
        self.cache = cache(config.layers, rows, config.heads, config.length, config.dim // config.heads, like)

    def step(self, x: Tensor, position: int | Tensor) -> Tensor:
        """Return the logits (R, V) at one position of R <= rows sequences whose earlier positions are cached.

        Args:
            x: (R, dim) embedded inputs.
            position: the position id, 0 .. N - 1; a (1,) int64 tensor where the decoder is masked.
        """
        rope = self.rope[position].reshape(1, 1, 1, -1)  # (1, 1, 1, head_dim / 2)
        for index, layer in enumerate(self.layers):
            x = layer.forward(x, rope, lambda q, k, v, at=index: self.cache.attend(at, position, q, k, v))
        return self.output(norm(x, self.model.norm))


def prefill(decoder: Decoder, labels: Tensor) -> Tensor:
    """Start sequences: labels (R,) int64 in 0 .. classes (the null class) -> logits (R, V) of the first code."""
    position = 0 if isinstance(decoder.cache, PrefixCache) else torch.zeros(1, dtype=torch.int64, device=labels.device)
    return decoder.step(decoder.model.cls_embedding(labels), position)


def decode_one(decoder: Decoder, codes: Tensor, position: int | Tensor) -> Tensor:
    """Go on: codes x_t (R,) int64 at position t -> logits (R, V) of x_{t+1}."""
    return decoder.step(decoder.model.tok_embeddings(codes), position)


class GraphedDecode:
    """:func:`decode_one` as one CUDA graph, replayed for every position. Needs a masked decoder on a CUDA device."""

    def __init__(self, decoder: Decoder, rows: int):
        device = decoder.model.output.weight.device
        self.codes = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate on their first call, which must not be captured
            for _ in range(3):
                decode_one(decoder, self.codes, self.position)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = decode_one(decoder, self.codes, self.position)

    def __call__(self, codes: Tensor, position: int) -> Tensor:
        """Return logits (R, V), overwritten by the next call."""
        self.codes.copy_(codes)
        self.position.fill_(position)
        self.graph.replay()
        return self.logits


def norm(x: Tensor, module: RMSNorm) -> Tensor:
    """RMSNorm of (R, dim), rounded as the module does: fp32 inside, cast back, then the weight."""
    return F.rms_norm(x.float(), x.shape[-1:], None, 1e-5).type_as(x) * module.weight


def pack(weight: Tensor, rows: int) -> Linear:
    """Return ``x -> x weight'`` for x (R, in), R about ``rows``; weight is (out, in).

    On CPUs the weight is reordered once for oneDNN, which is up to three times as fast as handing it over afresh at
    each of the hundreds of steps.
    """
    if weight.device.type == "cpu" and _onednn_takes(weight.dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return lambda x: F.linear(x, weight)


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Layer:
    """One block's weights, the feed-forward's two input matrices joined."""

    def __init__(self, block: Block, rows: int):
        attention, feed_forward = block.attention, block.feed_forward
        self.heads = attention.heads
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm
        self.qkv = pack(attention.wqkv.weight, rows)
        self.out = pack(attention.wo.weight, rows)
        self.gate_up = pack(torch.cat([feed_forward.w1.weight, feed_forward.w3.weight]), rows)
        self.down = pack(feed_forward.w2.weight, rows)

    def forward(self, x: Tensor, rope: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Return the block's output (R, dim) for x (R, dim)."""
        qkv = self.qkv(norm(x, self.attention_norm)).unflatten(-1, (3, self.heads, -1))  # (R, 3, H, head dim)
        pairs = torch.view_as_complex(qkv[:, :2].float().unflatten(-1, (-1, 2)))  # (R, 2, H, head dim / 2)
        q, k = torch.view_as_real(pairs * rope).flatten(-2).type_as(x).unbind(1)  # (R, H, head dim) each
        x = x + self.out(attend(q, k, qkv[:, 2]).flatten(-2))
        gate, up = self.gate_up(norm(x, self.ffn_norm)).chunk(2, dim=-1)  # (R, hidden) each
        return x + self.down(F.silu(gate) * up)
