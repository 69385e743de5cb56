"""MuToR by brute force, in float64: an interleaved sequence, a mask built cell by cell, complex rotary factors.

Written from the formulas and sharing nothing with the package: registers stand right after their anchor in the
sequence (`[c, r, x_1, r, ...]`, none or several per anchor), and every rule is a Python loop over tokens.
"""

import cmath
import math
from dataclasses import dataclass

import torch

BASE = 10000.0


@dataclass(frozen=True)
class Token:
    """One input of the interleaved sequence: regular input `anchor`, or a register that stands after it."""

    anchor: int
    register: int | None  # place among the sequence's registers, None for a regular input
    position: int  # row of the rotary table


def has_target(anchor, offset, tokens):
    return anchor + offset <= tokens


def position_of_register(anchor, offset, tokens):
    """The id of the regular input that would predict the same token; N - 1 when there is none."""
    return anchor + offset - 1 if has_target(anchor, offset, tokens) else tokens - 1


def interleave(anchors, offsets, tokens):
    """The inputs of one sequence in the order `[c, registers of c, x_1, registers of x_1, ...]`."""
    sequence = []
    for t in range(tokens):
        sequence.append(Token(t, None, t))
        for r, (anchor, offset) in enumerate(zip(anchors, offsets, strict=True)):
            if anchor == t:
                sequence.append(Token(t, r, position_of_register(anchor, offset, tokens)))
    return sequence


def may_see(sequence, q, k):
    """Whether input q may look at input k."""
    if sequence[k].register is not None:  # a register is seen by nobody but itself
        return q == k
    return sequence[k].anchor <= sequence[q].anchor


def dense_mask(sequence):
    """(S, S) of bool, filled cell by cell."""
    size = len(sequence)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for q in range(size):
        for k in range(size):
            mask[q, k] = may_see(sequence, q, k)
    return mask


def packed_mask(anchors, tokens):
    """(N + R, N + R) of bool for the layout `[c, x_1, ..., x_{N-1} | r, r, ...]`, filled cell by cell."""
    size = tokens + len(anchors)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for q in range(size):
        for k in range(size):
            if k >= tokens:
                mask[q, k] = q == k
            elif q >= tokens:
                mask[q, k] = k <= anchors[q - tokens]
            else:
                mask[q, k] = k <= q
    return mask


def masked_attention(q, k, v, mask):
    """Softmax attention of one head written out in float64: q, k, v (S, D), mask (S, S)."""
    scores = q.double() @ k.double().T / math.sqrt(q.shape[-1])
    scores = torch.exp(scores - scores.detach().max()) * mask
    return scores / scores.sum(-1, keepdim=True) @ v.double()


def rotation(position, width, head_dim):
    """The head_dim / 2 complex factors of one position: first half by the row, second by the column; zero for id 0."""
    if position == 0:
        return [0j] * (head_dim // 2)
    row, column = divmod(position - 1, width)
    frequencies = [BASE ** (-2 * i / (head_dim / 2)) for i in range(head_dim // 4)]
    return [cmath.exp(1j * row * f) for f in frequencies] + [cmath.exp(1j * column * f) for f in frequencies]


def rotate(x, factors):
    """x (S, H, D) turned by factors (S, D / 2): the pair (2i, 2i + 1) is one complex number."""
    turned = torch.complex(x[..., 0::2], x[..., 1::2]) * factors[:, None, :]
    return torch.stack([turned.real, turned.imag], dim=-1).flatten(-2)


def rms_norm(x, weight, eps=1e-5):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def attend(x, weights, prefix, heads, factors, mask):
    size, dim = x.shape
    projected = x @ weights[f"{prefix}.wqkv.weight"].T
    q, k, v = (projected[:, i * dim : (i + 1) * dim].reshape(size, heads, dim // heads) for i in range(3))
    if f"{prefix}.q_norm.weight" in weights:
        q, k = rms_norm(q, weights[f"{prefix}.q_norm.weight"]), rms_norm(k, weights[f"{prefix}.k_norm.weight"])
    q, k = rotate(q, factors), rotate(k, factors)
    mixed = [masked_attention(q[:, h], k[:, h], v[:, h], mask) for h in range(heads)]
    return torch.cat(mixed, dim=-1) @ weights[f"{prefix}.wo.weight"].T


def feed_forward(x, weights, prefix):
    gate = x @ weights[f"{prefix}.w1.weight"].T
    return (gate / (1 + torch.exp(-gate)) * (x @ weights[f"{prefix}.w3.weight"].T)) @ weights[f"{prefix}.w2.weight"].T


def forward_one(weights, label, codes, anchors, offsets, grid, heads, register_offsets=()):
    """(N, V) logits of the regular inputs and (R, V) of the registers, for one sequence without dropout.

    `weights` is a state dict with LlamaGen's names, `codes` the N - 1 known codes; `register_offsets` names the
    offset that each row of the register embedding stands for (empty: one shared row).
    """
    tokens = grid[0] * grid[1]
    sequence = interleave(anchors, offsets, tokens)
    mask = dense_mask(sequence).double()
    rows = []
    for token in sequence:
        if token.register is not None:
            offset = offsets[token.register]
            row = register_offsets.index(offset) if offset in register_offsets else 0  # dropped targets: any row
            rows.append(weights["register_embedding.weight"][row])
        elif token.anchor == 0:
            rows.append(weights["cls_embedding.embedding_table.weight"][label])
        else:
            rows.append(weights["tok_embeddings.weight"][codes[token.anchor - 1]])
    x = torch.stack(rows)
    head_dim = x.shape[-1] // heads
    factors = torch.tensor([rotation(token.position, grid[1], head_dim) for token in sequence], dtype=torch.complex128)
    layer = 0
    while f"layers.{layer}.attention.wo.weight" in weights:
        name = f"layers.{layer}"
        normed = rms_norm(x, weights[f"{name}.attention_norm.weight"])
        x = x + attend(normed, weights, f"{name}.attention", heads, factors, mask)
        x = x + feed_forward(rms_norm(x, weights[f"{name}.ffn_norm.weight"]), weights, f"{name}.feed_forward")
        layer += 1
    logits = rms_norm(x, weights["norm.weight"]) @ weights["output.weight"].T
    regular = [place for place, token in enumerate(sequence) if token.register is None]
    registers = {token.register: place for place, token in enumerate(sequence) if token.register is not None}
    return logits[regular], logits[[registers[r] for r in range(len(registers))]]


def forward(weights, labels, codes, anchors, offsets, grid, heads, register_offsets=()):
    """`forward_one` over a batch of tensors: (B, N, V) and (B, R, V)."""
    rows = zip(labels.tolist(), codes.tolist(), anchors.tolist(), offsets.tolist(), strict=True)
    pairs = [forward_one(weights, *row, grid, heads, register_offsets) for row in rows]
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])


def cross_entropy(logits, target):
    top = logits.detach().max()
    return top + torch.log(torch.exp(logits - top).sum()) - logits[target]


def loss(logits, register_logits, targets, anchors, offsets, weight):
    """(1 - a) * mean over the regular predictions + a * mean over the registers with a target, term by term.

    `targets` (B, N) holds x_1 ... x_N, so x_j is column j - 1.
    """
    batch, tokens = targets.shape
    regular, registers = [], []
    for b in range(batch):
        for t in range(tokens):
            regular.append(cross_entropy(logits[b, t], targets[b, t]))
        for r in range(anchors.shape[1]):
            anchor, offset = int(anchors[b, r]), int(offsets[b, r])
            if has_target(anchor, offset, tokens):
                registers.append(cross_entropy(register_logits[b, r], targets[b, anchor + offset - 1]))
    total = (1 - weight) * sum(regular) / len(regular)
    return total + weight * sum(registers) / len(registers) if registers else total


def pairs_2d(d_max):
    """The allowed (d_h, d_w), in no particular order."""
    return [(i, j) for i in range(1, d_max + 1) for j in range(1, d_max + 1) if (i, j) != (1, 1)]


def wraps(anchor, d_w, width):
    """Whether a 2D offset runs over the right edge; anchor 0 has no cell and never does."""
    return anchor >= 1 and (anchor - 1) % width + d_w - 1 >= width


def eligible_anchors(d_h, d_w, grid, wrap=True):
    """The anchors whose target exists (and, without `wrap`, lies in the columns to the right)."""
    height, width = grid
    offset = (d_h - 1) * width + d_w - 1
    anchors = [t for t in range(height * width) if has_target(t, offset, height * width)]
    return [t for t in anchors if wrap or not wraps(t, d_w, width)]
