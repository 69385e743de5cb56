"""The model beside the reference in `mutor.py`: small batches, the reference's logits, and the largest difference."""

import torch
from reference import mutor as reference

from mutor_img import draw_registers

TIGHT = 1e-5  # the model is in float64 here, but its norms and rotations run in fp32: errors of a few 1e-6 remain
BROKEN = 1e-2  # what a single wrong rule changes at the least
PLACEMENTS = {"dense": {}, "sparse": {"count": 4}, "every": {"every": 3}}


def batch_of(model, size=2, seed=0):
    """Labels, codes and targets for a model: the codes are the targets without the last."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(model.config.vocabulary, (size, model.config.length), generator=generator)
    return torch.randint(model.config.classes + 1, (size,), generator=generator), targets[:, :-1], targets


def registers_of(model, kind="2d", d_max=3, size=2, seed=0, step=0, count=None, **switches):
    return draw_registers(kind, count, d_max, model.config.grid, seed, step, torch.arange(size), **switches)


def brute(model, labels, codes, anchors, offsets, weights=None):
    weights = weights or {name: weight.double() for name, weight in model.state_dict().items()}
    config = model.config
    return reference.forward(weights, labels, codes, anchors, offsets, config.grid, config.heads,
                             config.register_offsets)


def difference(model, anchors, offsets):
    """Largest difference between the model's and the reference's logits, over rows that have a target."""
    labels, codes, _ = batch_of(model, len(anchors))
    with torch.no_grad():
        logits, register_logits = model(labels, codes, anchors, offsets)
    expected, expected_register = brute(model, labels, codes, anchors, offsets)
    found = anchors + offsets <= model.config.length
    assert found.any() and expected.std() > 0.5 and expected_register.std() > 0.5
    return max((logits - expected).abs().max().item(), (register_logits - expected_register)[found].abs().max().item())
