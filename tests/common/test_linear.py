"""The transformer's linear layer: PyTorch's, and on CPUs in bf16 the same in blocks of rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mutor_img.common.linear import BLOCK, Linear


class Products(TorchDispatchMode):
    """Notes the rows and columns of each matrix product."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.shapes.append(tuple(made.shape))
        return made


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype | None) -> tuple[torch.Tensor, ...]:
    """Return the output and the gradients of x and of the weight, for one gradient of the output."""
    x, layer.weight.grad = x.clone().requires_grad_(), None
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        y = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return y.detach(), x.grad, layer.weight.grad


@pytest.mark.parametrize("batch, length, inputs, outputs", [
    (4, 256, 96, 768), (4, 256, 768, 96), (3, 341, 768, 768), (2, 256, 96, 768), (6, 256, 96, 768), (4, 256, 96, 1024),
    (1, 1, 8, 8),
])
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
@pytest.mark.usefixtures("two_threads")
def test_it_computes_what_a_linear_layer_does(batch, length, inputs, outputs, dtype):
    torch.manual_seed(0)
    layer, x = Linear(inputs, outputs), torch.randn(batch, length, inputs)
    exact = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    made, wanted = run(layer, x, dtype), run(exact, x.double(), None)
    for name, mine, true in zip(("output", "gradient of x", "gradient of the weight"), made, wanted, strict=True):
        tolerance = 2.0**-7 if dtype else 1e-5
        assert (mine - true).norm() <= tolerance * true.norm(), name
    assert made[0].dtype == (dtype or torch.float32)
    assert made[1].dtype == made[2].dtype == torch.float32


@pytest.mark.usefixtures("two_threads")
def test_products_that_would_occupy_one_thread_are_made_in_blocks():
    rows = 2 * BLOCK
    x = torch.randn(rows, 768)
    with Products() as seen:
        run(Linear(768, 1024), x, torch.bfloat16)
    assert seen.shapes == [(rows, 1024), (BLOCK, 768), (BLOCK, 768), (1024, 768)]  # forward, gradients of x and weight
    with Products() as seen:
        run(Linear(768, 768), x[:700], torch.bfloat16)
    assert seen.shapes == [(BLOCK, 768), (700 - BLOCK, 768), (BLOCK, 768), (700 - BLOCK, 768), (768, 768)]
    for others in (x[:BLOCK], x.repeat(2, 1)):
        with Products() as seen:
            run(Linear(768, 768), others, torch.bfloat16)
        assert seen.shapes == [(len(others), 768)] * 2 + [(768, 768)]
    torch.set_num_threads(1)
    with Products() as seen:
        run(Linear(768, 768), x, torch.bfloat16)
    assert seen.shapes == [(rows, 768)] * 2 + [(768, 768)]


@pytest.mark.usefixtures("two_threads")
def test_compiled_without_a_break_it_computes_the_same():
    layer, x = Linear(768, 768), torch.randn(700, 768)
    eager = run(layer, x, torch.bfloat16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled.weight = layer.weight
    for mine, true in zip(run(compiled, x, torch.bfloat16), eager, strict=True):
        assert torch.equal(mine, true)


def test_frozen_weights_and_inputs_without_gradients_cost_no_product():
    layer, x = Linear(64, 64), torch.randn(8, 64)
    layer.weight.requires_grad_(False)
    for given, wanted in ((x.clone().requires_grad_(), 2), (x, 1)):
        with Products() as seen, torch.autocast("cpu", torch.bfloat16):
            y = layer(given)
            if y.requires_grad:
                y.sum().backward()
        assert len(seen.shapes) == wanted


def test_weights_have_the_names_of_a_linear_layer():
    assert list(Linear(8, 4).state_dict()) == ["weight"]
    assert Linear(8, 4).weight.shape == (4, 8)
    x = torch.randn(2, 3, 8)
    layer = Linear(8, 4)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
