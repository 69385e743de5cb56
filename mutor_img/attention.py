"""Who may attend to whom: the rule, written once, and its two backends.

A packed sequence is ``[c, x_1, .., x_{N-1} | r_1, .., r_R]``: N regular inputs, then R registers (paper section 3).
``SdpaAttention`` runs anywhere; ``FlexAttention`` is for training on GPUs (it has no backward on CPUs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

BLOCK = 128  # FlexAttention's block of queries and of keys
SMALL_HEAD = 10_000  # numbers in one head's queries; see _faster_in_fp32


def regular_sees_past(query: Tensor, key: Tensor, length: int) -> Tensor:
    """A regular input sees regular inputs up to itself, and no register."""
    return (query < length) & (key <= query)


def register_sees_context(query: Tensor, key: Tensor, anchor: Tensor, length: int) -> Tensor:
    """A register sees the regular inputs up to its anchor."""
    return (query >= length) & (key < length) & (key <= anchor)


def register_sees_itself(query: Tensor, key: Tensor, length: int) -> Tensor:
    """A register sees itself, and no other register."""
    return (query >= length) & (key == query)


def may_attend(query: Tensor, key: Tensor, anchor: Tensor, length: int) -> Tensor:
    """Return whether packed position ``query`` may attend to ``key`` (method section 2).

    Regular inputs never see a register; a register never sees a regular input past its anchor, nor another register.

    Args:
        query, key: int64 positions in the packed sequence, broadcast against each other.
        anchor: the query's anchor where it is a register; any value where it is not.
        length: N, the regular inputs.
    """
    return (
        regular_sees_past(query, key, length)
        | register_sees_context(query, key, anchor, length)
        | register_sees_itself(query, key, length)
    )


class SdpaAttention:
    """The rule on ``scaled_dot_product_attention``: regular rows plain causal, only register rows with a mask.

    Attributes:
        length: N.
        mask: (B, 1, R, N + R) bool, the rule's register rows, or None without registers.
    """

    def __init__(self, length: int, anchors: Tensor | None = None):
        self.length = length
        self.mask = None
        if anchors is not None:
            query = length + torch.arange(anchors.shape[1], device=anchors.device)  # (R,)
            key = torch.arange(length + anchors.shape[1], device=anchors.device)  # (N + R,)
            self.mask = may_attend(query[:, None], key, anchors[:, None, :, None], length)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; q, k, v and the result are (B, H, N + R, head dim)."""
        if _faster_in_fp32(q):
            with torch.autocast("cpu", enabled=False):  # it would convert them back
                return self(q.float(), k.float(), v.float()).to(q.dtype)
        n = self.length
        regular = F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], is_causal=True)
        if self.mask is None:
            return regular
        register = F.scaled_dot_product_attention(q[:, :, n:], k, v, attn_mask=self.mask)  # (B, H, R, head dim)
        return torch.cat([regular, register], dim=2)


def _faster_in_fp32(q: Tensor) -> bool:
    """Tell whether training on a CPU with these (B, H, S, head dim) queries is faster if bf16 becomes fp32 for it.

    Backward in bf16, the CPU kernel needs about 75 microseconds for every 32 queries, however few the keys and columns
    (seen with torch 2.14.1 on a Xeon with AMX). With conversion and forward pass, fp32 takes 0.3 to 0.7 times as long
    up to 8192 numbers per head, and at least as long from 12 288 on.
    """
    small = q.shape[-2] * q.shape[-1] < SMALL_HEAD
    return small and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad


class FlexAttention:
    """The rule on FlexAttention, with one BlockMask for a whole run.

    Dense anchors never change, so that their blocks are exact. Drawn anchors change each step: the blocks are then the
    union over all draws, every one of them partial, so that the rule is evaluated in each, and the anchors live in one
    tensor that the rule captures and :meth:`update` overwrites. (A mask made at one draw and used at another is
    silently wrong; a mask made anew each step recompiles.)
    """

    def __init__(self, length: int, anchors: Tensor, fixed_anchors: bool):
        """Build the mask.

        Args:
            length: N.
            anchors: (B, R) int64 of the first step, on the training device.
            fixed_anchors: the anchors are the same for every sequence and step (dense or every k-th).
        """
        self.length = length
        self.anchors = kept = anchors.clone()
        last = anchors.shape[1] - 1

        def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            anchor = kept[batch, (query - length).clamp(0, last)]
            return may_attend(query, key, anchor, length)

        total = length + anchors.shape[1]
        if fixed_anchors:
            self.block_mask = create_block_mask(rule, None, None, total, total, device=str(anchors.device),
                                                BLOCK_SIZE=BLOCK)
        else:
            self.block_mask = _union_block_mask(rule, length, total, anchors.device)

    def update(self, anchors: Tensor) -> None:
        """Take this step's (B, R) anchors, in place."""
        self.anchors.copy_(anchors)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; q, k, v and the result are (B, H, N + R, head dim).

        Raises:
            RuntimeError: called outside of a compiled region.
        """
        if not torch.compiler.is_compiling():
            raise RuntimeError("FlexAttention must run compiled: elsewhere it builds the whole matrix of scores")
        head_dim = q.shape[-1]
        q, k, v = (_heads_inside(x) for x in (q, k, v))
        return flex_attention(q, k, v, block_mask=self.block_mask, scale=head_dim**-0.5)[..., :head_dim]


def flex_width(head_dim: int) -> int:
    """Return how many columns FlexAttention's kernel takes for a head: a power of two, and what a matrix unit takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _heads_inside(x: Tensor) -> Tensor:
    """Return x (B, H, S, head dim) with zeros up to :func:`flex_width`, and in memory (B, S, H, ..).

    A copy, because inside a compiled block the kernel misreads the strides of q, k and v as they come out of one
    product (seen on CPUs with torch 2.14.1: wrong by as much as the logits are large).

    In this order, because the result comes in that of q. The product after it then reads the result as it is, and the
    kernel its gradient: neither is copied. Rotation writes q and k in this order at once.

    A power of two, because the GPU kernel computes on that many columns anyway but looks its tile sizes up by the exact
    head dimension: at the 100 of the 3B preset it falls back to a default tile, which in fp32 needs more shared memory
    than an A100 has (180 480 of 166 912 bytes with torch 2.14.1, compiled for one; padded 147 968). Zeros in q and k
    leave the scores as they are, zeros in v stand in columns that are cut off; the scale is the real head dimension's.
    """
    head_dim = x.shape[-1]
    return F.pad(x, (0, flex_width(head_dim) - head_dim)).transpose(1, 2).contiguous().transpose(1, 2)


def _union_block_mask(rule, length: int, total: int, device: torch.device) -> BlockMask:
    """Return the blocks that any draw of anchors could touch, all partial.

    A block of queries needs the key blocks of regular inputs up to its own diagonal (for a block of registers, which
    stand behind all regular inputs, that is every one of them), and its diagonal block: registers see themselves.
    """
    blocks = -(-total // BLOCK)
    first = torch.arange(blocks) * BLOCK  # (blocks,) first position of each block
    regular_keys = (first < length)[None]
    diagonal = torch.eye(blocks, dtype=torch.bool)
    causal = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    needed = (regular_keys & causal) | diagonal  # (query blocks, key blocks)
    counts = needed.sum(dim=1).to(torch.int32)[None, None]  # (1, 1, blocks)
    indices = needed.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)[None, None]
    return BlockMask.from_kv_blocks(counts.to(device), indices.to(device), BLOCK_SIZE=BLOCK, mask_mod=rule,
                                    seq_lengths=(total, total))
