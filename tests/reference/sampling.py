"""Sampling without a cache, a batch or a shared filter: written from the definitions, one row at a time in numpy."""

import math

import numpy as np
import torch

from mutor_img.common.streams import Stream, uniform


def scale_at(schedule, scale, parameter, token, length):
    """Guidance scale of one token."""
    ratio = token / (length - 1)
    return {
        "constant": lambda: scale,
        "interval": lambda: scale if token <= parameter + 1 else 1.0,
        "linear": lambda: 1 + (scale - 1) * ratio,
        "power-cosine": lambda: 1 + (scale - 1) * math.sin(math.pi / 2 * ratio**parameter) ** 2,
    }[schedule]()


def next_distribution(model, label, codes, scale=1.0, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution of the next code after ``codes``, by whole forward passes and numpy sorts; sums to 1."""
    def logits_of(condition):
        inputs = torch.tensor([list(codes)], dtype=torch.int64)
        return model(torch.tensor([condition]), inputs)[0, -1].double().numpy()

    with torch.no_grad():
        logits = logits_of(label)
        if scale > 1:
            without = logits_of(model.config.classes)
            logits = without + scale * (logits - without)
    return filtered(logits, temperature, top_k, top_p)


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Softmax of (V,) logits after top-k, then top-p."""
    mass = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    if top_k:
        mass[order[top_k:]] = 0
    mass /= mass.sum()
    keep = 1
    while top_p < 1 and mass[order[:keep]].sum() < top_p:
        keep += 1
    if top_p < 1:
        mass[order[keep:]] = 0
    return mass / mass.sum()


def sample(model, label, number, seed=0, schedule="constant", cfg_scale=1.0, parameter=None, kept=(), **filters):
    """One image's codes, and how near each random number came to the edge of its code's share.

    ``kept`` are codes by place that are not drawn; those below 0 are.
    """
    length, codes, margins = model.config.length, [], []
    for token in range(length):
        if token < len(kept) and kept[token] >= 0:
            codes.append(kept[token])
            continue
        scale = scale_at(schedule, cfg_scale, parameter, token, length)
        edges = np.concatenate([[0.0], np.cumsum(next_distribution(model, label, codes, scale, **filters))])
        draw = float(uniform(seed, Stream.TOKEN, torch.tensor(number), torch.tensor(token)))
        code = int(np.flatnonzero(edges[1:] > draw)[0])
        margins.append(min(draw - edges[code], edges[code + 1] - draw))
        codes.append(code)
    return codes, min(margins)
