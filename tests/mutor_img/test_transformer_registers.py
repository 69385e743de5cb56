"""What follows from the rule of registers: who depends on whom, and where gradients go."""

import pytest
import torch
from reference.comparison import BROKEN, PLACEMENTS, TIGHT, batch_of, registers_of

from mutor_img import mutor_loss


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_regular_logits_are_identical_with_and_without_registers(random_model, placement):
    model = random_model()
    labels, codes, _ = batch_of(model)
    alone = model(labels, codes)
    with_registers, _ = model(labels, codes, *registers_of(model, **PLACEMENTS[placement]))
    torch.testing.assert_close(with_registers, alone, atol=2e-6, rtol=0)


def test_the_order_of_registers_in_memory_does_not_matter(random_model):
    model = random_model(dtype=torch.float64)
    labels, codes, _ = batch_of(model)
    anchors, offsets = registers_of(model, mixed=True)
    order = torch.randperm(anchors.shape[1], generator=torch.Generator().manual_seed(1))
    _, logits = model(labels, codes, anchors, offsets)
    _, permuted = model(labels, codes, anchors[:, order], offsets[:, order])
    assert (permuted - logits[:, order]).abs().max() < TIGHT
    assert (permuted - logits).abs().max() > BROKEN


def test_a_register_never_sees_another_register(random_model):
    model = random_model(register_offsets=(1, 2, 5, 6, 7, 10, 11, 12), dtype=torch.float64)
    labels, codes, _ = batch_of(model)
    anchors, offsets = registers_of(model, mixed=True)
    _, together = model(labels, codes, anchors, offsets)
    alone = [model(labels, codes, anchors[:, [r]], offsets[:, [r]])[1] for r in range(anchors.shape[1])]
    assert (torch.cat(alone, dim=1) - together).abs().max() < TIGHT


def test_a_register_sees_no_code_past_its_anchor(random_model):
    model = random_model(dtype=torch.float64)
    labels, codes, _ = batch_of(model)
    anchors, offsets = registers_of(model)
    _, before = model(labels, codes, anchors, offsets)
    changed = codes.clone()
    changed[:, 9:] = (codes[:, 9:] + 1) % 11  # x_10 and on
    _, after = model(labels, changed, anchors, offsets)
    assert (after - before)[:, :10].abs().max() == 0
    assert (after - before)[:, 10:].abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("weight, reached", [(0.0, False), (0.5, True), (1.0, True)])
def test_the_gradient_reaches_the_register_embedding_as_the_weight_says(random_model, weight, reached):
    model = random_model()
    labels, codes, targets = batch_of(model)
    anchors, offsets = registers_of(model)
    mutor_loss(*model(labels, codes, anchors, offsets), targets, anchors, offsets, weight).backward()
    gradient = model.register_embedding.weight.grad
    assert gradient.shape == (1, 32) and bool((gradient != 0).all() if reached else (gradient == 0).all())


def test_only_the_rows_of_drawn_offsets_get_a_gradient(random_model):
    model = random_model(register_offsets=(1, 2, 5, 6, 7, 10, 11, 12))
    labels, codes, targets = batch_of(model)
    anchors, offsets = torch.tensor([[3, 4], [5, 6]]), torch.tensor([[5, 5], [12, 12]])
    mutor_loss(*model(labels, codes, anchors, offsets), targets, anchors, offsets).backward()
    touched = model.register_embedding.weight.grad.abs().amax(1) > 0
    assert touched.tolist() == [False, False, True, False, False, False, False, True]


def test_a_single_offset_has_the_row_of_the_shared_embedding(random_model):
    model, shared = random_model(register_offsets=(5,)), random_model()
    shared.load_state_dict(model.state_dict())
    labels, codes = torch.tensor([1]), torch.randint(11, (1, 19))
    anchors, offsets = torch.tensor([[0, 7]]), torch.tensor([[5, 5]])
    for mine, its in zip(model(labels, codes, anchors, offsets), shared(labels, codes, anchors, offsets), strict=True):
        assert torch.equal(mine, its)


def test_at_weight_one_the_last_codes_embedding_gets_no_gradient_from_next_token_prediction(random_model):
    model = random_model()
    labels, codes, targets = batch_of(model, 1)
    anchors, offsets = torch.tensor([[4]]), torch.tensor([[3]])
    mutor_loss(*model(labels, codes, anchors, offsets), targets, anchors, offsets, weight=1.0).backward()
    touched = set(model.tok_embeddings.weight.grad.abs().amax(1).nonzero().flatten().tolist())
    assert touched == set(codes[0, :4].tolist())
