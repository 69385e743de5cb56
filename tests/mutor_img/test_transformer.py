"""The transformer against the interleaved brute-force MuToR, and the facts that released weights depend on."""

import json
import math
from itertools import product

import pytest
import torch
from reference import mutor as reference
from timm.layers import DropPath
from torch import nn

from mutor_img import draw_registers, mutor_loss
from mutor_img import transformer as product_module
from mutor_img.attention import SdpaAttention
from mutor_img.errors import UserError
from mutor_img.registers import RegisterLaw, register_ids
from mutor_img.transformer import PRESETS, Block, ModelConfig, RMSNorm, RotaryTable, Transformer, rotate

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
    model.rope.table = model.rope.table.roll(4, dims=-1)
    assert difference(model, *registers_of(model)) > BROKEN


def test_the_comparison_notices_the_wrong_row_of_a_register_embedding(random_model):
    model = random_model(register_offsets=(1, 2, 5, 6, 7, 10, 11, 12), dtype=torch.float64)
    right = model._embed_registers
    model._embed_registers = lambda offsets: right(offsets + 1)
    assert difference(model, *registers_of(model)) > BROKEN


# ---- consequences of the rule


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


def test_a_register_whose_offset_is_one_differs_from_its_anchor_only_by_its_embedding(random_model):
    """Anchor t at offset 1 has the anchor's id and context, and is still its own input."""
    model = random_model(dtype=torch.float64)
    labels, codes, _ = batch_of(model)
    anchors = torch.arange(20).expand(2, 20)
    with torch.no_grad():
        logits, register_logits = model(labels, codes, anchors, torch.ones_like(anchors))
    assert (logits - register_logits).abs().amax(-1).min() > BROKEN


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


def test_at_weight_one_the_last_codes_embedding_gets_no_gradient_from_next_token_prediction(random_model):
    model = random_model()
    labels, codes, targets = batch_of(model, 1)
    anchors, offsets = torch.tensor([[4]]), torch.tensor([[3]])
    mutor_loss(*model(labels, codes, anchors, offsets), targets, anchors, offsets, weight=1.0).backward()
    touched = set(model.tok_embeddings.weight.grad.abs().amax(1).nonzero().flatten().tolist())
    assert touched == set(codes[0, :4].tolist())


# ---- initialisation


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_first_loss_is_the_logarithm_of_the_vocabulary(weight):
    model = Transformer(ModelConfig(2, 2, 32, (4, 5), 97, 3, register_offsets=()))
    labels, codes, targets = batch_of(model)
    anchors, offsets = registers_of(model)
    loss = mutor_loss(*model(labels, codes, anchors, offsets), targets, anchors, offsets, weight)
    assert loss.item() == pytest.approx(math.log(97), rel=1e-6)


def test_weights_are_drawn_with_deviation_0_02_the_head_is_zero_and_norms_are_one():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(2, 2, 64, (4, 5), 500, 300, register_offsets=tuple(range(1, 101))))
    for name, weight in model.named_parameters():
        if name == "output.weight":
            assert (weight == 0).all()
        elif weight.dim() == 1:
            assert (weight == 1).all()
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05) and abs(weight.mean().item()) < 2e-3, name


# ---- facts of the released weights


@pytest.mark.parametrize("preset, count, hidden", [
    ("B", 110_888_448, 2048), ("L", 342_910_976, 2816), ("XL", 774_699_520, 3584), ("XXL", 1_410_972_672, 4096),
    ("3B", 3_096_659_200, 8704)])
def test_presets_have_the_released_parameter_counts_and_hidden_sizes(preset, count, hidden):
    with torch.device("meta"):
        model = Transformer(ModelConfig.preset(preset))
    assert model.parameter_count() == sum(p.numel() for p in model.parameters()) == count
    assert model.config.hidden == model.layers[0].feed_forward.w1.out_features == hidden
    assert len(model.state_dict()) == 7 * len(model.layers) + 4


def test_presets_are_the_released_sizes():
    released = {"B": (12, 12, 768), "L": (24, 16, 1024), "XL": (36, 20, 1280), "XXL": (48, 24, 1536),
                "3B": (24, 32, 3200)}
    assert {name: PRESETS[name] for name in released} == released
    assert [dim // heads for _, heads, dim in released.values()] == [64, 64, 64, 64, 100]


@pytest.mark.parametrize("register_offsets", [None, (), (1, 5, 6)])
def test_state_dict_names_are_llamagens_and_the_register_embedding(register_offsets):
    model = Transformer(ModelConfig(2, 2, 32, (4, 5), 11, 3, register_offsets=register_offsets))
    names = {"cls_embedding.embedding_table.weight", "tok_embeddings.weight", "norm.weight", "output.weight"}
    for layer in ("layers.0.", "layers.1."):
        names |= {layer + part + ".weight" for part in (
            "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2",
            "attention_norm", "ffn_norm")}
    extra = set() if register_offsets is None else {"register_embedding.weight"}
    assert set(model.state_dict()) == names | extra
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert shapes["cls_embedding.embedding_table.weight"] == (4, 32) and shapes["tok_embeddings.weight"] == (11, 32)
    assert shapes["layers.0.attention.wqkv.weight"] == (96, 32) and shapes["output.weight"] == (11, 32)
    if extra:
        assert shapes["register_embedding.weight"] == (len(register_offsets) or 1, 32)


def test_there_are_no_biases_and_input_and_output_embeddings_are_untied():
    model = Transformer(ModelConfig(2, 2, 32, (4, 5), 11, 3))
    assert not any(name.endswith("bias") for name in model.state_dict())
    assert model.output.weight.data_ptr() != model.tok_embeddings.weight.data_ptr()


@pytest.mark.parametrize("grid, head_dim", [((16, 16), 64), ((4, 5), 16), ((3, 7), 100)])
def test_the_rotary_table_is_the_formula_with_a_zero_row_for_the_class_token(grid, head_dim):
    table = RotaryTable(grid, head_dim).table
    assert table.dtype == torch.float32 and table.shape == (grid[0] * grid[1] + 1, 2, head_dim // 2)
    expected = torch.tensor([reference.rotation(i, grid[1], head_dim) for i in range(len(table))])
    assert (table[0] == 0).all()
    assert (torch.complex(table[:, 0], table[:, 1]) - expected).abs().max() < 3e-6


def test_the_rotary_table_stays_exact_in_fp32_through_casts(random_model):
    model = random_model()
    before = model.rope.table.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        model.to(dtype)
        assert model.output.weight.dtype == dtype
        assert model.rope.table.dtype == torch.float32 and torch.equal(model.rope.table, before)


def test_rotation_is_done_in_fp32_on_pairs_of_neighbours():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    rope = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(1, 1, 2, 2)  # first pair by 90 degrees, second by none
    assert rotate(x, rope).flatten().tolist() == [-2.0, 1.0, 3.0, 4.0]
    assert rotate(x.bfloat16(), rope).dtype == torch.bfloat16


def test_the_class_tokens_query_and_key_are_zero_and_only_its_value_flows(random_model):
    model, seen = random_model(), []

    def attend(q, k, v):
        seen.append((q, k, v))
        return v

    x = torch.randn(2, 20, 32)
    model.layers[0].attention(x, model.rope(torch.arange(20))[None], attend)
    q, k, v = seen[0]
    assert q.shape == k.shape == v.shape == (2, 2, 20, 16)
    assert (q[:, :, 0] == 0).all() and (k[:, :, 0] == 0).all() and (v[:, :, 0] != 0).all()
    assert (q[:, :, 1:] != 0).all()


def test_the_norm_works_in_fp32_casts_back_and_then_weighs():
    norm = RMSNorm(8)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16() * 100
    wide = x.float()
    expected = (wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 8))
    assert torch.equal(norm(x), expected * norm.weight) and norm(x).dtype == torch.float32
    assert RMSNorm(4)(torch.full((4,), 1e-4)).max().item() == pytest.approx(1e-4 / math.sqrt(1e-8 + 1e-5), rel=1e-5)


# ---- dropout and training


def test_dropout_stands_after_the_embeddings_each_attention_and_each_feed_forward():
    model = Transformer(ModelConfig(3, 2, 32, (4, 5), 11, 3, dropout=0.1))
    places = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    blocks = {f"layers.{i}.{part}.dropout": 0.1 for i in range(3) for part in ("attention", "feed_forward")}
    assert places == {"dropout": 0.1, **blocks}


def test_a_drop_path_switches_the_dropouts_of_blocks_off_and_grows_with_depth():
    model = Transformer(ModelConfig(3, 2, 32, (4, 5), 11, 3, dropout=0.1, drop_path=0.2))
    places = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert places.pop("dropout") == 0.1 and set(places.values()) == {0.0}
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize("dropout, drop_path", [(1.0, 0.0), (0.0, 1.0)])
def test_a_block_that_drops_everything_is_the_identity_in_training_only(dropout, drop_path):
    """Dropout stands after the output projection and the feed-forward, drop-path around both."""
    torch.manual_seed(0)
    block = Block(ModelConfig(2, 2, 32, (4, 5), 11, 3, dropout=dropout), drop_path)
    x, rope, attend = torch.randn(2, 20, 32), RotaryTable((4, 5), 16)(torch.arange(20))[None], SdpaAttention(20)
    assert torch.equal(block.train()(x, rope, attend), x)
    assert not torch.equal(block.eval()(x, rope, attend), x)


def test_class_token_codes_and_registers_go_through_the_same_input_dropout(random_model):
    model, seen = random_model(dropout=0.5).train(), []
    model.dropout.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    labels, codes, _ = batch_of(model)
    model(labels, codes, *registers_of(model))
    before, after = seen[0]
    assert before.shape == (2, 40, 32)
    zeroed = (after == 0).float().mean(-1)  # (B, N + R)
    assert (zeroed > 0.1).all() and (zeroed < 0.9).all() and torch.allclose(after[after != 0], 2 * before[after != 0])
    torch.testing.assert_close(before[:, 20:], model.register_embedding.weight.expand(2, 20, 32))


@pytest.mark.parametrize("drop_path", [0.0, 0.2])
@pytest.mark.parametrize("registers", [False, True])
def test_training_and_evaluation_both_yield_a_loss_that_learns(random_model, drop_path, registers):
    model = random_model(drop_path=drop_path)
    labels, codes, targets = batch_of(model, 4)
    drawn = registers_of(model, size=4) if registers else ()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for step in range(25):
        model.train(step not in (0, 24))
        output = model(labels, codes, *drawn)
        loss = mutor_loss(*output, targets, *drawn) if registers else mutor_loss(output, None, targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    assert all(map(math.isfinite, history)) and history[-1] < 0.7 * history[0]


def test_evaluation_is_deterministic_and_training_with_dropout_is_not(random_model):
    model = random_model()
    labels, codes, _ = batch_of(model)
    assert torch.equal(model(labels, codes), model(labels, codes))
    model.train()
    assert not torch.equal(model(labels, codes), model(labels, codes))


# ---- mistakes


@pytest.mark.parametrize("mistake", [
    {"labels": (2, 1)}, {"labels": (3,)}, {"codes": (2, 20)}, {"codes": (19,)}, {"anchors": (2, 3)},
    {"offsets": (2, 3)}, {"anchors": (3, 4)}, {"anchors": (4,), "offsets": (4,)}, {"anchors": None},
    {"offsets": None}, {"codes": (2, 18)}, {"labels": (3,), "anchors": None, "offsets": None},
    {"codes": (2, 20), "anchors": None, "offsets": None}])
def test_wrong_shapes_are_errors(random_model, mistake):
    shapes = {"labels": (2,), "codes": (2, 19), "anchors": (2, 4), "offsets": (2, 4), **mistake}
    model = random_model()
    with pytest.raises(ValueError):
        model(**{name: None if shape is None else torch.ones(shape, dtype=torch.int64)
                 for name, shape in shapes.items()})


def test_registers_on_a_model_without_them_are_an_error(random_model):
    model = random_model(register_offsets=None)
    assert not hasattr(model, "register_embedding")
    labels, codes, _ = batch_of(model)
    with pytest.raises(ValueError, match="register"):
        model(labels, codes, *registers_of(model))


def test_a_head_dimension_that_cannot_be_rotated_is_an_error():
    with pytest.raises(UserError, match="multiple of 4"):
        ModelConfig(2, 2, 36)
    with pytest.raises(UserError, match="did you mean 'XXL'"):
        ModelConfig.preset("XXXL")


def test_a_config_survives_json():
    for register_offsets in (None, (), (1, 2, 16)):
        config = ModelConfig(2, 2, 32, (4, 5), 11, 3, 0.2, 0.1, register_offsets)
        assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
