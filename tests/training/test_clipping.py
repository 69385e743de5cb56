"""Clipping of the gradient norm: PyTorch's, to the bit, but a CPU leaves alone what is short enough."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mutor_img.training.optimizer import clip_gradients


class Written(TorchDispatchMode):
    """Notes the operations that change a tensor in place."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [str(func)] if func._schema.is_mutable else []
        return func(*args, **(kwargs or {}))


def weights(scale: float) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape)) for shape in ((30, 7), (7,), (2, 3, 4))]
    for weight in made[:2]:  # the third has no gradient
        weight.grad = scale * torch.randn(weight.shape, generator=draw)
    return made


NORM = float(torch.cat([weight.grad.flatten() for weight in weights(1.0)[:2]]).double().norm())


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1 / NORM, (1 - 5e-7) / NORM, (1 + 5e-7) / NORM, 1.0, math.inf, math.nan])
@pytest.mark.parametrize("most", [1.0, 0.0])
def test_the_bits_are_those_of_pytorchs_own(scale, most):
    ours, theirs = weights(scale), weights(scale)
    norm = nn.utils.clip_grad_norm_(theirs, most or math.inf)
    torch.testing.assert_close(clip_gradients(ours, most), norm, rtol=0, atol=0, equal_nan=True)
    if math.isfinite(scale):
        for mine, its in zip(ours[:2], theirs[:2]):
            assert torch.equal(mine.grad, its.grad)
    assert ours[2].grad is None


def test_the_norm_is_that_of_all_gradients_together_and_no_longer_than_asked():
    some = weights(1.0)
    assert float(clip_gradients(some, 0.5)) == pytest.approx(NORM, rel=1e-6)
    assert float(torch.cat([weight.grad.flatten() for weight in some[:2]]).norm()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("most, touched", [(2 * NORM, False), (NORM / 2, True), (0.0, False)])
def test_on_a_cpu_gradients_that_are_short_enough_are_not_touched(most, touched):
    with Written() as seen:
        clip_gradients(weights(1.0), most)
    assert any("mul_" in name for name in seen.names) == touched
