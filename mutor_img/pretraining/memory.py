"""Memory of a generator's training step on one GPU, by category, from shapes alone.

Counted are the bytes that autograd keeps for the backward pass, as torch 2.14 keeps them: eager operation by operation;
compiled as the partitioner of torch.compile cuts a block, or a read-out (it computes cheap things again). A token is an
input of the transformer, regular or register. Symbols: d the model's width, h the feed-forward's, H heads, V codes, w
the bytes of a number where matrix products are made (2 in bf16, 4 in fp32). The residual stream is fp32 in both
precisions.
"""

from __future__ import annotations

from dataclasses import dataclass

from mutor_img.attention import flex_width
from mutor_img.blocks import ModelConfig, block_weights

FP32 = 4  # bytes


@dataclass(frozen=True)
class Step:
    """What decides a step's memory beside the model's shapes.

    Attributes:
        sequences: sequences of one forward pass on the device.
        registers: R, registers per sequence.
        precision: ``"bf16"`` or ``"fp32"``.
        compiled: blocks are compiled, and read-outs whose logits are whole.
        checkpointing: only a block's input is kept, and its activations are computed again.
        flex: registers attend by FlexAttention, not by scaled_dot_product_attention with a mask.
        loss_chunk: rows of logits at a time; 0: all.
        ema: averaged weights are kept.
        shards: devices that share weights, gradients, optimiser and EMA (FSDP2); 1: each holds all of them.
        blocks: of the objective, beside the model's.
        read_outs: of the objective: N rows of logits each, beside the next tokens' and the registers'.
        kept_numbers: of the objective: what its small networks keep per input.
        accumulate: gradients are summed over several forward passes before the devices exchange them.
    """

    sequences: int
    registers: int = 0
    precision: str = "bf16"
    compiled: bool = True
    checkpointing: bool = False
    flex: bool = True
    loss_chunk: int = 0
    ema: bool = False
    shards: int = 1
    blocks: int = 0
    read_outs: int = 0
    kept_numbers: int = 0
    accumulate: bool = False

    @property
    def width(self) -> int:
        """w, the bytes of a number where matrix products are made."""
        return 2 if self.precision == "bf16" else FP32


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. ``logits`` and ``working`` are never there together; all else is, at the worst moment."""

    weights: float
    gradients: float
    optimiser: float
    ema: float
    copies: float  # weights in bf16; of sharded weights, what is gathered at a time
    activations: float
    logits: float  # with what read-outs keep, loss and gradients of the logits
    working: float  # gradients of a block's activations; with checkpointing its activations, too

    @property
    def total(self) -> float:
        """Bytes at the worst moment."""
        held = self.weights + self.gradients + self.optimiser + self.ema + self.copies + self.activations
        return held + max(self.logits, self.working)


def step_memory(config: ModelConfig, parameters: int, step: Step) -> Memory:
    """Return the memory of a training step of ``config`` with so many parameters."""
    tokens = step.sequences * (config.length + step.registers)
    block = block_bytes(config, step)
    kept = FP32 * config.dim if step.checkpointing else block
    working = 2 * FP32 * config.dim + step.width * (config.dim + 3 * config.hidden)
    state = FP32 * parameters / step.shards
    whole = FP32 * parameters if step.shards > 1 and step.accumulate else 0  # summed first, shared out afterwards
    return Memory(
        weights=state, gradients=state + whole, optimiser=2 * state, ema=state if step.ema else 0.0,
        copies=copied_weight_bytes(config, parameters, step),
        activations=tokens * ((config.layers + step.blocks) * kept + outer_bytes(config, step)
                              + step.width * step.kept_numbers),
        logits=logit_bytes(config, step) + tokens * (1 + step.read_outs) * read_out_bytes(config, step),
        working=tokens * (working + (block if step.checkpointing else 0)),
    )


def block_bytes(config: ModelConfig, step: Step) -> float:
    """Return the bytes per token that one block keeps."""
    d, h, w = config.dim, config.hidden, step.width
    kept_masks = 1 if step.compiled else 2  # bool, after the feed-forward; after attention it is cheap to compute again
    masks = kept_masks * d if config.dropout > 0 and config.drop_path == 0 else 0
    statistics = 2 * FP32 + FP32 * config.heads  # of two norms; log-sum-exp of each head
    if step.compiled:  # block's input, normed; attention and its projection; normed; feed-forward: w1, w3, product
        kept = FP32 * d + w * d + w * d + w * d + 3 * w * h
    else:  # fp32: both inputs and both normalised; what products read; feed-forward: w1, w3, silu, product
        casts = 3 if w < FP32 else 2  # wqkv's input, and w1's and w3's own casts of one tensor
        kept = 4 * FP32 * d + casts * w * d + 4 * w * h
    return kept + masks + statistics + qk_norm_bytes(config, step) + attention_bytes(config, step)


def qk_norm_bytes(config: ModelConfig, step: Step) -> float:
    """Return the bytes per token that the norms of queries and keys keep: a statistic of each head.

    Eager also what was normalised, and what the norms read: in bf16 q and k once more in fp32, in fp32 the whole of
    qkv, which attention keeps itself unless it reads copies.
    """
    if not config.qk_norm:
        return 0
    statistics, d, w = 2 * FP32 * config.heads, config.dim, step.width
    if step.compiled:
        return statistics
    copies = step.flex if step.registers else d // config.heads % 8
    return statistics + 2 * w * d + (2 * FP32 * d if w < FP32 else 3 * FP32 * d if copies else 0)


def padded_head(config: ModelConfig, step: Step) -> int:
    """Return how many columns attention's kernel takes for a head; SDPA's takes a multiple of 8."""
    head = config.dim // config.heads
    return flex_width(head) if step.registers and step.flex else -(-head // 8) * 8


def attention_bytes(config: ModelConfig, step: Step) -> float:
    """Return the bytes per token that attention keeps: q, k, v and its result.

    The output projection reads the result as it is; where heads are padded, a copy that is cut, which is kept, too.
    """
    d, w = config.dim, step.width
    head, padded = d // config.heads, padded_head(config, step)
    if step.registers and not step.flex:  # q, k turned, v inside the whole of qkv; two results, joined; mask as numbers
        return w * d * (2 + 3 + 1 + 1) + w * step.registers
    if step.registers or padded > head:  # copies
        return w * d * (4 * padded / head + (padded > head))
    return w * d * (2 + 3 + 1)  # q and k as turned, v inside the whole of qkv


def outer_bytes(config: ModelConfig, step: Step) -> float:
    """Return the bytes per token kept from before the blocks: what the first dropout needs, and the turns of positions.

    Eager the dropout keeps its mask. Compiled it computes it again from its keys, two numbers, which lie in memory with
    those of the blocks' masks.
    """
    d, places = config.dim, 1 + 2 * (config.layers + step.blocks)
    dropped = (2 * FP32 * places if step.compiled else d) if config.dropout > 0 else 0
    turns = 2 * FP32 * d // config.heads / (1 if step.registers else step.sequences)
    return dropped + turns


def read_out_bytes(config: ModelConfig, step: Step) -> float:
    """Return the bytes per token that a read-out keeps beside logits: the norm's input and the head's.

    Eager also what was normalised. Compiled also the norm's statistic, and two of the cross-entropy's. With a chunked
    loss the gradient of the head's input stands in that one's place.
    """
    whole_and_compiled = step.compiled and not step.loss_chunk
    return (FP32 + step.width) * config.dim + (3 * FP32 if whole_and_compiled else FP32 * config.dim)


def logit_bytes(config: ModelConfig, step: Step) -> float:
    """Return the bytes of logits, loss and their gradients at their worst moment.

    Whole: of all rows log-probabilities in fp32, and for the regular rows or the registers', whose losses are made one
    after the other, two gradients in fp32. Whole and compiled: of all rows logits as the product makes them, and for
    the regular rows or the registers' their gradient. Chunked: logits and log-probabilities of a chunk in fp32, the
    head's gradient in fp32, once for each read-out, and the head in bf16.
    """
    head = config.vocabulary * config.dim
    if step.loss_chunk:
        rows = min(step.loss_chunk, step.sequences * config.length)
        copies = FP32 * ((2 if step.registers else 1) + step.read_outs) + (step.width if step.width < FP32 else 0)
        return 2 * FP32 * config.vocabulary * rows + head * copies
    n, r, others = config.length, step.registers, step.read_outs * config.length
    if step.compiled:
        return step.width * config.vocabulary * step.sequences * (n + r + max(n, r) + others)
    return FP32 * config.vocabulary * step.sequences * (max(3 * n, n + 3 * r) + others)


def copied_weight_bytes(config: ModelConfig, parameters: int, step: Step) -> float:
    """Return the bytes of weights held a second time.

    Autocast keeps each matrix that a product reads in bf16 until the backward pass. Sharded weights are gathered:
    embeddings and head in fp32 for the whole step, blocks one by one with the next one on its way; of the larger of
    both there are whole gradients, as computed and in fp32 to be reduced.
    """
    block = block_weights(config)
    head = 0 if step.loss_chunk else config.vocabulary * config.dim
    blocks = config.layers + step.blocks
    if step.shards > 1:
        outermost = parameters - blocks * block
        gathered = FP32 * outermost + step.width * 2 * block + (step.width * head if step.width < FP32 else 0)
        return gathered + max(2 * FP32 * outermost, (step.width + FP32) * block)
    return step.width * (blocks * block + head) if step.width < FP32 else 0.0
