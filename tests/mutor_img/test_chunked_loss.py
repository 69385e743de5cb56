"""The chunked loss is the whole one, and holds no more logits than it says."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mutor_img.blocks import ModelConfig
from mutor_img.chunked_loss import chunked_cross_entropy_sum, read_out_losses
from mutor_img.objectives.mutor import Mutor
from mutor_img.objectives.objective import Batch, Objective
from mutor_img.registers import IGNORE, RegisterLaw, cross_entropy_sum
from mutor_img.transformer import Transformer

BATCH, LENGTH, DIM, VOCABULARY = 3, 7, 16, 37


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(BATCH, LENGTH, DIM, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, DIM, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    targets[1, 2] = targets[2, 6] = IGNORE
    return hidden, weight, targets


def by_hand(hidden, weight, targets):
    """Row by row in float64: the loss, and its slopes from softmax less one at the target."""
    hidden, weight = hidden.detach().double(), weight.detach().double()
    loss, hidden_grad, weight_grad = 0.0, torch.zeros_like(hidden), torch.zeros_like(weight)
    for b in range(BATCH):
        for s in range(LENGTH):
            target = int(targets[b, s])
            if target < 0:
                continue
            logits = [math.fsum((hidden[b, s] * row).tolist()) for row in weight]
            top = max(logits)
            total = math.fsum(math.exp(x - top) for x in logits)
            loss += math.log(total) + top - logits[target]
            for v, logit in enumerate(logits):
                slope = math.exp(logit - top) / total - (v == target)
                hidden_grad[b, s] += slope * weight[v]
                weight_grad[v] += slope * hidden[b, s]
    return loss, hidden_grad, weight_grad


@pytest.mark.parametrize("rows", [1, 4, 7, 21, 100])
def test_loss_and_gradients_are_those_of_the_definition(rows):
    hidden, weight, targets = inputs()
    loss = chunked_cross_entropy_sum(hidden, weight, targets, rows)
    (0.25 * loss).backward()
    expected, hidden_grad, weight_grad = by_hand(hidden, weight, targets)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=2e-6)
    torch.testing.assert_close(hidden.grad.double(), 0.25 * hidden_grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), 0.25 * weight_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 4, 100])
def test_several_targets_of_a_row_count_like_as_many_rows(rows):
    hidden, weight, targets = inputs()
    several = torch.stack([targets, targets.roll(1, 0), targets, targets.roll(2, 1)], dim=2)  # (B, S, 4), one twice
    head = torch.nn.Linear(DIM, VOCABULARY, bias=False)
    head.weight = torch.nn.Parameter(weight.detach())
    [loss] = read_out_losses(hidden, torch.nn.Identity(), head, [several], rows)
    loss.backward()
    expected = [by_hand(hidden, weight, several[..., k]) for k in range(4)]
    assert loss.item() == pytest.approx(sum(loss for loss, _, _ in expected), rel=2e-6)
    for found, place in ((hidden.grad, 1), (head.weight.grad, 2)):
        torch.testing.assert_close(found.double(), sum(by[place] for by in expected), rtol=1e-5, atol=1e-5)


def test_under_bf16_autocast_the_loss_is_the_whole_ones_and_gradients_as_good():
    hidden, weight, targets = inputs()
    expected, hidden_grad, weight_grad = by_hand(hidden.bfloat16(), weight.bfloat16(), targets)
    found = []
    for chunked in (True, False):
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (chunked_cross_entropy_sum(h, w, targets, 5) if chunked
                    else cross_entropy_sum(torch.nn.functional.linear(h, w), targets))
        loss.backward()
        found.append((loss, h.grad, w.grad))
    (loss, h_grad, w_grad), (whole, h_whole, w_whole) = found
    assert loss.dtype == torch.float32 and h_grad.dtype == w_grad.dtype == torch.float32
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6) and loss.item() == pytest.approx(expected, rel=5e-3)
    for mine, theirs, exact in ((h_grad, h_whole, hidden_grad), (w_grad, w_whole, weight_grad)):
        assert (mine - exact).norm() < 1.2 * (theirs - exact).norm() and (theirs - exact).norm() < 0.01 * exact.norm()


def test_without_gradients_only_the_loss_is_made():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        loss = chunked_cross_entropy_sum(hidden, weight, targets, 4)
    assert not loss.requires_grad and loss.item() == pytest.approx(by_hand(hidden, weight, targets)[0], rel=2e-6)


def test_it_compiles_into_one_graph():
    hidden, weight, targets = inputs()
    compiled = torch.compile(chunked_cross_entropy_sum, backend="aot_eager", fullgraph=True)
    plain, other = (torch.autograd.grad(f(hidden, weight, targets, 4), [hidden, weight])
                    for f in (chunked_cross_entropy_sum, compiled))
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


class Widest(TorchDispatchMode):
    """Notes the most rows of a tensor with as many columns as there are codes, and every copy to the host."""

    def __init__(self):
        super().__init__()
        self.rows, self.names = 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.names.add(str(function))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            wide = isinstance(x, torch.Tensor) and x.dim() >= 2 and x.shape[-1] == VOCABULARY
            if wide and x.shape != (DIM, VOCABULARY):
                self.rows = max(self.rows, x.numel() // VOCABULARY)
        return result


def test_no_more_than_a_chunk_of_logits_exists_and_the_host_never_waits():
    hidden, weight, targets = inputs()
    with Widest() as seen:
        chunked_cross_entropy_sum(hidden, weight, targets, 3).backward()
    assert seen.rows == 3  # but for weight.T, which is (DIM, VOCABULARY)
    assert not any("local_scalar_dense" in name or "nonzero" in name for name in seen.names)


@pytest.mark.parametrize("registers", [0, 5])
def test_the_losses_of_objectives_are_those_of_the_models_logits(registers):
    torch.manual_seed(0)
    config = ModelConfig(1, 2, 16, grid=(3, 4), vocabulary=VOCABULARY, classes=3, dropout=0.0, register_offsets=())
    model = Transformer(config)
    torch.nn.init.normal_(model.output.weight)
    codes = torch.randint(VOCABULARY, (2, 12))
    places = ()
    if registers:
        places = (torch.tensor([[0, 2, 5, 9, 11]] * 2), torch.tensor([[1], [4]]).expand(2, 5))
    logits = model(torch.tensor([0, 3]), codes[:, :-1], *places)
    logits = (logits,) if not registers else logits
    expected = [-sum(row.log_softmax(-1)[int(code)] for row, code in zip(logits[0].flatten(0, 1), codes.flatten()))]
    if registers:
        expected.append(-sum(logits[1][b, r].log_softmax(-1)[int(codes[b, t + d - 1])]
                             for b in range(2) for r, (t, d) in enumerate(zip(*(x[b].tolist() for x in places)))
                             if t + d <= 12))
    objective = Mutor(config, RegisterLaw("2d", (3, 4), 3), 0.5) if registers else Objective(config)
    for chunk in (0, 5):
        batch = Batch(torch.tensor([0, 3]), codes[:, :-1], codes, *places)
        sums = list(model(within=partial(objective, batch=batch, rows=chunk)).values())
        for mine, theirs in zip(sums, expected, strict=True):
            assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
        gradients = torch.autograd.grad(sum(sums), list(model.parameters()), allow_unused=True)
        whole = torch.autograd.grad(sum(expected), list(model.parameters()), allow_unused=True, retain_graph=True)
        for mine, theirs in zip(gradients, whole, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
