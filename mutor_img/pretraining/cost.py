"""What an update costs on one accelerator, term by term: computed from shapes, a data sheet and a few fitted numbers.

Kernels run one after the other, so that an update takes the sum of six terms:

==========  ==========================================================================================
products    FLOPs of the matrix products, at the share :data:`PRODUCTS` of the peak
attention   FLOPs of the blocks of scores that its kernels visit, at the share :data:`PLAIN` or :data:`MASKED`
blocks      bytes that the blocks' other kernels read and write, at :data:`BANDWIDTH` of the memory's
read-out    bytes of the logits on their way to the loss and back, likewise
optimiser   bytes of weights, gradients, moments, averages and copies in bf16, likewise
rest        :data:`REST`: small kernels, and waits for the CPU; longer where the CPU needs longer to launch the blocks
            than the device to run them, :data:`LAUNCH` for each
==========  ==========================================================================================

FLOPs and bytes are counted, and tests compare them with torch's own counts. :data:`PRODUCTS` and :data:`REST` are
fitted to seven updates of B that were measured on one H100 (docs/gpu.md), by least squares of relative errors. The
other shares are not determined by these rows: products and traffic grow together, and a fit of :data:`BANDWIDTH` too,
or of both shares of attention, has products faster than the peak. So they are assumed, as is :data:`LAUNCH`: the
fastest of these updates, divided by its blocks. Left out are communication, reading, scores and pictures, the norms of
queries and keys, and what objectives have beside blocks and logits, of which only the FLOPs count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mutor_img.attention import BLOCK
from mutor_img.blocks import ModelConfig, block_flops, block_weights
from mutor_img.pretraining.memory import FP32, Step, padded_head
from mutor_img.registers import RegisterLaw

PRODUCTS = 0.73  # share of the peak, fitted
PLAIN, MASKED = 0.4, 0.15  # shares of the peak, without registers and with them, assumed
BANDWIDTH = 0.75  # share of the memory's, assumed
REST = 0.0113  # seconds per update, fitted: in 2.1 ms of them the device is busy
LAUNCH = 0.0022  # seconds of the CPU per block in a forward and a backward pass, assumed
EAGER = 5  # times the bytes of a compiled block
EAGER_MASK = 90  # bytes beside that, for each number that dropout may drop
H100_MEMORY = 3.35e12  # bytes per second of an H100 SXM's memory, by its data sheet


@dataclass(frozen=True)
class Device:
    """Peaks of an accelerator by its data sheet.

    Attributes:
        flops: FLOP/s of matrix products in the run's precision.
        memory: bytes per second of its memory.
    """

    flops: float
    memory: float = H100_MEMORY


@dataclass(frozen=True)
class Cost:
    """Seconds of an update on one device, by what takes them; ``flops`` are the model's, as MFU counts them."""

    products: float
    attention: float
    blocks: float
    read_out: float
    optimiser: float
    rest: float
    flops: float
    device: Device

    @property
    def work(self) -> float:
        """Seconds of all terms but the rest."""
        return self.products + self.attention + self.blocks + self.read_out + self.optimiser

    @property
    def seconds(self) -> float:
        """Seconds of an update."""
        return self.work + self.rest

    @property
    def mfu(self) -> float:
        """The share of the device's peak that the model's FLOPs reach."""
        return self.flops / self.seconds / self.device.flops


def update_cost(config: ModelConfig, parameters: int, step: Step, passes: int, *, flops: float, attended: float,
                cells: float, device: Device) -> Cost:
    """Return what an update costs on one device.

    Args:
        config: the model's sizes.
        parameters: that are trained.
        step: of one forward pass.
        passes: forward passes of the update, each with its backward pass.
        flops: of a sequence's update, forward and backward, as MFU counts them.
        attended: the part of them that is attention.
        cells: what :func:`attention_cells` gives.
        device: its peaks.
    """
    sequences, tokens, blocks = passes * step.sequences, config.length + step.registers, config.layers + step.blocks
    again = 0.0  # FLOPs of a block that are computed once more: all but its last product, which no gradient needs
    if step.checkpointing:
        again = block_flops(config, tokens, 0.0) - 2.0 * config.dim * config.hidden * tokens
    logits = config.vocabulary * (config.length * (1 + step.read_outs) + step.registers)
    attention = (MASKED if step.registers else PLAIN) * device.flops
    memory = BANDWIDTH * device.memory
    work = {
        "products": sequences * (flops - attended + blocks * again) / (PRODUCTS * device.flops),
        "attention": sequences * blocks * cells * cell_flops(config, step) / attention,
        "blocks": sequences * blocks * tokens * block_traffic(config, step) / memory,
        "read_out": sequences * logits * logit_traffic(step) / memory,
        "optimiser": weight_traffic(config, parameters, step, passes) / memory,
    }
    rest = max(REST, LAUNCH * blocks * passes - sum(work.values()))
    return Cost(**work, rest=rest, flops=sequences * flops, device=device)


def attention_cells(law: RegisterLaw, seed: int, flex: bool = True) -> int:
    """Return how many query-key pairs of a sequence the kernels of attention visit: whole blocks, causal or masked.

    Args:
        law: the registers.
        seed: the run's.
        flex: registers attend by FlexAttention; else by SDPA, whose kernel visits every pair that a mask has.
    """
    length, registers = law.length, law.registers
    last = torch.arange(length)  # (N + R,), the last regular input that each query sees
    if registers and flex:
        # Where anchors are drawn, the mask's blocks are the union over all draws.
        anchors = law.draw(seed, 0, torch.zeros(1, dtype=torch.int64))[0][0]  # (R,)
        last = torch.cat([last, anchors if law.count is None else torch.full_like(anchors, length - 1)])
    blocks = 0
    for number, queries in enumerate(last.split(BLOCK)):
        seen = int(queries.max()) // BLOCK + 1
        itself = number * BLOCK + len(queries) > length and number >= seen  # a register sees itself
        blocks += seen + itself
    return blocks * BLOCK**2 + (0 if flex else registers * (length + registers))


def cell_flops(config: ModelConfig, step: Step) -> float:
    """Return the FLOPs of one query-key pair in all heads of a block: 2 products forward, and 5 backward."""
    return 2.0 * config.heads * padded_head(config, step) * (9 if step.checkpointing else 7)


def block_traffic(config: ModelConfig, step: Step) -> float:
    """Return the bytes per token that a block's kernels read and write beside products and attention itself.

    Kernel by kernel as torch.compile fuses them for GPUs, the residual stream in fp32; eager :data:`EAGER` times that,
    and the masks of dropout.
    """
    d, w = config.dim, step.width
    mask = 1 if config.dropout > 0 and config.drop_path == 0 else 0  # of the feed-forward's dropout, bool
    turns = 2 * FP32 * d / config.heads  # cos and sin of a position
    # Copies: of v, unless SDPA takes it as it is; of the result and its gradient, where the result is cut or joined.
    cut = padded_head(config, step) > d // config.heads or (step.registers and not step.flex)
    copies = 6 * w * d if cut else 2 * w * d if step.registers else 0
    last = (2 * FP32 + 2 * w + mask) * d  # residuals and both branches' results in, the stream out
    forward = (
        (FP32 + w) * d  # norm
        + 4 * w * d + turns  # q and k turned
        + (FP32 + 2 * w) * d  # dropout, residual and norm
        + 3 * w * config.hidden  # silu and product
        + last)
    backward = (
        (FP32 + w + mask) * d  # dropout after the feed-forward
        + 5 * w * config.hidden  # product and silu
        + (3 * FP32 + 4 * w) * d  # norm, residual and dropout, whose mask is computed again
        + 6 * w * d + turns  # q and k turned back, put together with v
        + (FP32 + 4 * w) * d  # weights of both norms
        + (3 * FP32 + w) * d)  # norm and residual
    again = forward - last if step.checkpointing else 0
    compiled = forward + backward + copies + again
    return compiled if step.compiled else EAGER * compiled + 2 * mask * EAGER_MASK * d


def logit_traffic(step: Step) -> float:
    """Return the bytes that are written and read per logit, those of the head's products included.

    Compiled: written by the product, read for the loss; read, and its gradient written, on the way back, which two
    products read. Eager, or in chunks: besides, log-probabilities and two gradients in fp32, each written and read.
    """
    w = step.width
    if step.compiled and not step.loss_chunk:
        return 6.0 * w
    casts = 2 * (FP32 + w) if w < FP32 else 0
    return 3 * w + 6 * FP32 + casts


def weight_traffic(config: ModelConfig, parameters: int, step: Step, passes: int) -> float:
    """Return the bytes of an update that do not grow with its tokens.

    Per parameter in fp32: clipping reads the gradient for its norm, then reads and writes it; AdamW reads weight,
    gradient and two moments, and writes all but the gradient; an average is read and written, its weight read. In each
    pass, per weight of a matrix: its copy in bf16 is made, and its gradient is widened to fp32. From the second pass on
    gradients are added to those of the first.
    """
    matrices = (config.layers + step.blocks) * block_weights(config)
    matrices += config.vocabulary * config.dim
    held = FP32 * (3 + 7 + (3 if step.ema else 0)) * parameters / step.shards
    copies = 2 * (step.width + FP32) * matrices * passes if step.width < FP32 else 0
    return held + copies + 3 * FP32 * parameters * (passes - 1)
