"""What tests of objectives read off a model: its losses, whom their gradients reach, and cosines by hand."""

import math

import torch


def losses(model, batch, rows=0):
    """The sums by term of a batch, and so the forward pass of training."""
    return model(within=lambda whole: whole.objective(whole, batch, rows))


def angle(a, b):
    """The cosine, in plain Python."""
    a, b = a.tolist(), b.tolist()
    return sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)


def reached(loss, module):
    """Whether the weights of a module have a gradient other than zero: {True}, {False}, or both."""
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return {gradient is not None and bool(gradient.abs().max() > 0) for gradient in found}
