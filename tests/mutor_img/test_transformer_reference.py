"""The transformer equals the interleaved brute-force MuToR, and the comparison notices each single broken rule."""

from itertools import product

import pytest
import torch
from reference import mutor as reference
from reference.comparison import BROKEN, PLACEMENTS, TIGHT, batch_of, brute, difference, registers_of

from mutor_img import mutor_loss
from mutor_img import transformer as product_module
from mutor_img.registers import RegisterLaw, register_ids

CASES = [(placement, kind, mixed, per_offset, wrap, grid)
         for placement, kind, mixed, per_offset, wrap, grid in
         product(PLACEMENTS, ["1d", "2d"], [False, True], [False, True], [True, False], [(4, 5), (3, 7)])
         if wrap or kind == "2d"]


@pytest.mark.parametrize("placement, kind, mixed, per_offset, wrap, grid", CASES)
def test_logits_loss_and_every_gradient_equal_the_interleaved_reference(
        random_model, placement, kind, mixed, per_offset, wrap, grid):
    rows = RegisterLaw(kind, grid, 3).offsets if per_offset else ()
    model = random_model(grid, register_offsets=rows, dtype=torch.float64)
    switches = {**PLACEMENTS[placement], "mixed": mixed, "wrap": wrap}
    anchors, offsets = registers_of(model, kind, step=3, **switches)
    assert difference(model, anchors, offsets) < TIGHT

    labels, codes, targets = batch_of(model)
    loss = mutor_loss(*model(labels, codes, anchors, offsets), targets, anchors, offsets, weight=0.3)
    loss.backward()
    weights = {name: weight.detach().double().requires_grad_() for name, weight in model.named_parameters()}
    expected = reference.loss(*brute(model, labels, codes, anchors, offsets, weights), targets, anchors, offsets, 0.3)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=TIGHT)
    for name, weight in model.named_parameters():
        assert weights[name].grad.abs().max() > 1e-5
        torch.testing.assert_close(weight.grad, weights[name].grad, atol=TIGHT, rtol=1e-4, msg=lambda m, n=name: n + m)


def test_several_registers_at_one_anchor_and_none_at_others_equal_the_reference(random_model):
    model = random_model(dtype=torch.float64)
    anchors = torch.tensor([[7, 7, 7, 0, 0, 19, 2], [19, 18, 17, 3, 3, 3, 0]])
    offsets = torch.tensor([[1, 5, 6, 12, 1, 1, 2], [1, 2, 3, 7, 7, 2, 20]])
    assert difference(model, anchors, offsets) < TIGHT


def test_queries_and_keys_that_are_normalised_equal_the_reference(random_model):
    model = random_model(qk_norm=True, dtype=torch.float64)
    registers = registers_of(model, mixed=True)
    assert difference(model, *registers) < TIGHT
    model.layers[1].attention.q_norm = torch.nn.Identity()  # as if q_norm and k_norm were not read
    assert difference(model, *registers) > BROKEN


def test_normalised_queries_and_keys_have_the_dtype_of_values_under_autocast(random_model):
    model, seen = random_model(qk_norm=True), []
    with torch.autocast("cpu", torch.bfloat16):
        model.layers[0](torch.randn(2, 5, 32), model.rope(torch.arange(5))[None],
                        lambda q, k, v: seen.append((q.dtype, k.dtype, v.dtype)) or v)
    assert seen == [(torch.bfloat16,) * 3]  # FlexAttention takes no mixture


def test_single_precision_equals_the_reference_to_single_precision(random_model):
    model = random_model()
    assert difference(model, *registers_of(model, mixed=True)) < 1e-4


def test_inference_without_registers_equals_the_reference_on_every_prefix(random_model):
    model = random_model(dtype=torch.float64)
    labels, codes, _ = batch_of(model)
    expected = torch.stack([
        reference.forward_one(model.state_dict(), int(labels[b]), codes[b].tolist(), [], [], (4, 5), 2)[0]
        for b in range(2)])
    for length in (0, 1, 7, 19):
        logits = model(labels, codes[:, :length])
        assert (logits - expected[:, : length + 1]).abs().max() < TIGHT


# ---- the comparison can fail: each single broken rule shows


def dense_attention(rule):
    """A stand-in for SdpaAttention that evaluates `rule(q, k, anchor of q or None, N)` on every cell."""

    class Dense:
        def __init__(self, length, anchors):
            self.mask = torch.stack([torch.tensor([
                [rule(q, k, row[q - length] if q >= length else None, length) for k in range(length + len(row))]
                for q in range(length + len(row))]) for row in anchors.tolist()])

        def __call__(self, q, k, v):
            scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~self.mask[:, None], -torch.inf)
            return scores.softmax(-1) @ v

    return Dense


def right_rule(q, k, anchor, n):
    if q < n:
        return k <= q
    return k <= anchor or k == q


BROKEN_RULES = {
    "regular inputs see registers": lambda q, k, a, n: right_rule(q, k, a, n) or (q < n <= k and k - n <= q),
    "regular inputs see the future": lambda q, k, a, n: right_rule(q, k, a, n) or (q < n and k == q + 1 < n),
    "registers see each other": lambda q, k, a, n: right_rule(q, k, a, n) or (q >= n and k >= n),
    "registers see earlier registers": lambda q, k, a, n: right_rule(q, k, a, n) or n <= k <= q,
    "registers do not see themselves": lambda q, k, a, n: right_rule(q, k, a, n) and (q < n or k != q),
    "registers see past their anchor": lambda q, k, a, n: right_rule(q, k, a, n) or (q >= n and k == a + 1 < n),
    "registers do not see their anchor": lambda q, k, a, n: right_rule(q, k, a, n) and (q < n or k != a or a == 0),
}


def test_a_dense_attention_with_the_right_rule_passes_the_comparison(random_model, monkeypatch):
    monkeypatch.setattr(product_module, "SdpaAttention", dense_attention(right_rule))
    model = random_model(dtype=torch.float64)
    assert difference(model, *registers_of(model)) < TIGHT


@pytest.mark.parametrize("rule", BROKEN_RULES.values(), ids=BROKEN_RULES.keys())
def test_the_comparison_notices_a_broken_attention_rule(random_model, monkeypatch, rule):
    monkeypatch.setattr(product_module, "SdpaAttention", dense_attention(rule))
    model = random_model(dtype=torch.float64)
    assert difference(model, *registers_of(model)) > BROKEN


BROKEN_PARTS = {
    "may_attend shifted by one anchor": (
        "mutor_img.attention.register_sees_context",
        lambda query, key, anchor, length: (query >= length) & (key < length) & (key < anchor)),
    "no register sees itself": (
        "mutor_img.attention.register_sees_itself", lambda query, key, length: (query < 0) & (key < 0)),
    "ids one too high": (
        "mutor_img.transformer.register_ids", lambda a, d, n: (a + d).clamp(max=n - 1)),
    "ids one too low": (
        "mutor_img.transformer.register_ids", lambda a, d, n: (register_ids(a, d, n) - 1).clamp(min=0)),
    "ids of the anchor": (
        "mutor_img.transformer.register_ids", lambda a, d, n: a),
}


@pytest.mark.parametrize("target, broken", BROKEN_PARTS.values(), ids=BROKEN_PARTS.keys())
def test_the_comparison_notices_a_broken_mask_or_id(random_model, monkeypatch, target, broken):
    model = random_model(dtype=torch.float64)
    registers = registers_of(model)
    assert difference(model, *registers) < TIGHT
    monkeypatch.setattr(target, broken)
    assert difference(model, *registers) > BROKEN


def test_the_comparison_notices_an_identity_rotation_of_the_class_token(random_model):
    model = random_model(dtype=torch.float64)
    model.rope.table[0, 0] = 1.0
    assert difference(model, *registers_of(model)) > BROKEN


def test_the_comparison_notices_rows_and_columns_exchanged_in_the_rotation(random_model):
    model = random_model(dtype=torch.float64)
    model.rope.table = model.rope.table.roll(8, dims=-1)
    assert difference(model, *registers_of(model)) > BROKEN


def test_the_comparison_notices_the_wrong_row_of_a_register_embedding(random_model):
    model = random_model(register_offsets=(1, 2, 5, 6, 7, 10, 11, 12), dtype=torch.float64)
    right = model._embed_registers
    model._embed_registers = lambda offsets: right(offsets + 1)
    assert difference(model, *registers_of(model)) > BROKEN
