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


class PrefixCache:
    """Keys and values so far, read as slices up to the current position: the least memory traffic, for CPUs.

    One query a sequence makes attention a matter of memory and of dtype conversions, so the cache is at least fp32
    whatever the weights are: bf16 would be widened again at each step, which costs more than reading fp32.
    """

    def __init__(self, layers: int, rows: int, heads: int, length: int, head_dim: int, like: Tensor):
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.store = torch.zeros(layers, 2, rows, heads, length, head_dim, device=like.device, dtype=dtype)

    def attend(self, layer: int, position: int, qkv: Tensor) -> Tensor:
        """Keep this position's keys and values and attend to all so far.

        Args:
            qkv: (R, 3, H, head dim); queries are scaled already.

        Returns:
            (R, H, head dim).
        """
        store = self.store[layer, :, : len(qkv)]  # (2, R, H, N, head dim)
        store[:, :, :, position] = qkv[:, 1:].transpose(0, 1)
        keys, values = store[:, :, :, : position + 1].unbind(0)  # (R, H, seen, head dim) each
        # Two batched products are a third faster here than CPUs' fused attention, which is made for many queries.
        scores = torch.matmul(qkv[:, 0, :, None].to(keys.dtype), keys.transpose(2, 3))  # (R, H, 1, seen)
        return torch.matmul(scores.softmax(-1), values)[:, :, 0]


class MaskedCache:
    """Keys and values with the position as a tensor: nothing changes shape, so that a CUDA graph can replay a step."""

    def __init__(self, layers: int, rows: int, heads: int, length: int, head_dim: int, like: Tensor):
        self.store = torch.zeros(layers, 2, rows, heads, length, head_dim, device=like.device, dtype=like.dtype)
        self.places = torch.arange(length, device=like.device)  # (N,)

    def attend(self, layer: int, position: Tensor, qkv: Tensor) -> Tensor:
        """As :meth:`PrefixCache.attend`, with position (1,) int64."""
        qkv = qkv.to(self.store.dtype)
        store = self.store[layer, :, : len(qkv)]  # (2, R, H, N, head dim)
        store.index_copy_(3, position, qkv[:, 1:, :, None].transpose(0, 1))
        keys, values = store.unbind(0)  # (R, H, N, head dim) each
        mask = (self.places <= position)[None, None, None]  # (1, 1, 1, N)
        return F.scaled_dot_product_attention(qkv[:, 0, :, None], keys, values, attn_mask=mask, scale=1.0)[:, :, 0]


class Decoder:
    """A transformer's weights prepared for decoding ``rows`` sequences, and their cache.

    Weights are taken as they are now. The next images need no clearing of the cache: nothing beyond the current
    position is read.

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
        self.output = Packed(model.output.weight, rows)
        head_dim = config.dim // config.heads
        turns = torch.view_as_complex(model.rope.table.transpose(1, 2).contiguous())  # (N + 1, head_dim / 2)
        self.rope = torch.stack([turns * head_dim**-0.5, turns], dim=1)[:, None, :, None]  # (N + 1, 1, 2, 1, ..): q, k
        cache = MaskedCache if masked else PrefixCache
        self.cache = cache(config.layers, rows, config.heads, config.length, head_dim, like)

    def step(self, x: Tensor, position: int | Tensor) -> Tensor:
        """Return the logits (R, V) at one position of R <= rows sequences whose earlier positions are cached.

        Args:
            x: (R, dim) embedded inputs.
            position: the position id, 0 .. N - 1; a (1,) int64 tensor where the decoder is masked.
        """
        rope = self.rope[position].reshape(self.rope.shape[1:])  # (1, 2, 1, head_dim / 2)
        for index, layer in enumerate(self.layers):
            x = layer.forward(x, rope, lambda qkv, at=index: self.cache.attend(at, position, qkv))
        return self.output(norm(x, self.model.norm))


def prefill(decoder: Decoder, labels: Tensor) -> Tensor:
    """Start sequences: labels (R,) int64 in 0 .. classes (the null class) -> logits (R, V) of the first code."""
    position = 0 if isinstance(decoder.cache, PrefixCache) else torch.zeros(1, dtype=torch.int64, device=labels.device)
    return decoder.step(decoder.model.cls_embedding(labels), position)


def decode_one(decoder: Decoder, codes: Tensor, position: int | Tensor) -> Tensor:
    """Go on: codes x_t (R,) int64 at position t -> logits (R, V) of x_{t+1}."""
    return decoder.step(decoder.model.tok_embeddings(codes), position)


class GraphedDecode:
    """:func:`decode_one` as one CUDA graph, replayed for every position: a step costs one launch.

    The decoder must be masked and on a CUDA device; all of its rows take part.
    """

    def __init__(self, decoder: Decoder):
        device = decoder.model.output.weight.device
        self.codes = torch.zeros(decoder.rows, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries allocate on their first calls, which must not be captured
                for _ in range(3):
                    decode_one(decoder, self.codes, self.position)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph):
                self.logits = decode_one(decoder, self.codes, self.position)

    def __call__(self, codes: Tensor, position: int) -> Tensor:
        """Return logits (rows, V), overwritten by the next call."""
        self.codes.copy_(codes)
        self.position.fill_(position)
        with torch.cuda.device(self.codes.device):
            self.graph.replay()
        return self.logits


def norm(x: Tensor, module: RMSNorm) -> Tensor:
    """RMSNorm of (R, dim), rounded as the module does: fp32 inside, cast back, then the weight."""
    return F.rms_norm(x.float(), x.shape[-1:], None, 1e-5).type_as(x) * module.weight


class Packed:
    """A linear layer without bias: x (R, in) -> (R, out), and what follows it in the same pass.

    On CPUs the weight is reordered once for oneDNN, which is up to three times as fast as handing it over afresh at
    each of the hundreds of steps.
    """

    def __init__(self, weight: Tensor, rows: int):
        """Take a weight (out, in); R will mostly be ``rows``."""
        self.weight = weight.detach()
        self.packed = None
        if weight.device.type == "cpu" and _onednn_takes(weight.dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), rows)

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


class _Layer:
    """One block's weights."""

    def __init__(self, block: Block, rows: int):
        attention, feed_forward = block.attention, block.feed_forward
        self.heads = attention.heads
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm
        self.qkv, self.out = Packed(attention.wqkv.weight, rows), Packed(attention.wo.weight, rows)
        self.gate, self.up, self.down = (Packed(linear.weight, rows)
                                         for linear in (feed_forward.w1, feed_forward.w3, feed_forward.w2))

    def forward(self, x: Tensor, rope: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the block's output (R, dim) for x (R, dim)."""
        qkv = self.qkv(norm(x, self.attention_norm)).float().unflatten(-1, (3, self.heads, -1))  # (R, 3, H, head dim)
        torch.view_as_complex(qkv[:, :2].unflatten(-1, (-1, 2))).mul_(rope)  # pairs turn in place
        x = self.out.plus(attend(qkv).flatten(-2).type_as(x), x)
        y = norm(x, self.ffn_norm)
        return self.down.plus(self.up.times(y, self.gate.silu(y)), x)
