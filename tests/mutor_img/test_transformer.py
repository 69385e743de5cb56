"""The transformer's initialisation, the facts that released weights depend on, its dropout, and what it refuses."""

import json
import math

import pytest
import torch
from reference import mutor as reference
from reference.comparison import batch_of, registers_of

from mutor_img import mutor_loss
from mutor_img.blocks import PRESETS, ModelConfig, RMSNorm, RotaryTable, rotate
from mutor_img.common.dropout import kept, mask_keys, row_keys
from mutor_img.common.errors import UserError
from mutor_img.transformer import Transformer

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
    rope = RotaryTable(grid, head_dim)
    table, (cos, sin) = rope.table, rope.factors().unbind(-1)
    assert table.dtype == torch.float32 and table.shape == (grid[0] * grid[1] + 1, 2, head_dim)
    expected = torch.tensor([reference.rotation(i, grid[1], head_dim) for i in range(len(table))])
    assert (table[0] == 0).all()
    assert (torch.complex(cos, sin) - expected).abs().max() < 3e-6
    assert torch.equal(table[:, 0], cos.repeat_interleave(2, dim=-1)) and torch.equal(table[:, 1, ::2], -sin)


def test_the_rotary_table_stays_exact_in_fp32_through_casts(random_model):
    model = random_model()
    before = model.rope.table.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        model.to(dtype)
        assert model.output.weight.dtype == dtype
        assert model.rope.table.dtype == torch.float32 and torch.equal(model.rope.table, before)


def test_rotation_is_done_in_fp32_on_pairs_of_neighbours():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    rope = torch.tensor([[0.0, 0.0, 1.0, 1.0], [-1.0, 1.0, 0.0, 0.0]])[None, None]  # 90 degrees for the first pair
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


KEYS = mask_keys(0, 0, torch.arange(2), 7)  # of three blocks


def inner_states(model, keys, *batch):
    """Return what the model's last norm reads, in training mode with these keys."""
    model.train()
    return model(within=lambda whole: whole.run(*batch).states[model.config.layers], keys=keys)


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_dropout_is_of_the_inputs_and_of_what_each_attention_and_each_feed_forward_adds(random_model, drop_path):
    """A drop path is in place of the latter two: of a whole sequence's part, at a rate that grows from block to block.

    Registers are inputs as any other.
    """
    model, rates = random_model(layers=3, dropout=0.2, drop_path=drop_path), [0.0, 0.2, 0.4]
    batch = (*batch_of(model)[:2], *registers_of(model))

    def masked(x, place, rate, whole):
        rows = row_keys(KEYS[place], 40, 32)
        mask = kept(rows[:, :1], 1, rate) if whole else kept(rows, 32, rate)
        return x * mask / (1 - rate)

    run = model.eval().run(*batch, taps=(0,))
    x = masked(run.states[0], 0, 0.2, whole=False)  # (B, N + R, dim)
    for i, block in enumerate(model.layers):
        rate, whole = (rates[i], True) if drop_path else (0.2, False)
        x = x + masked(block.attention(block.attention_norm(x), run.rope, run.attend), 1 + 2 * i, rate, whole)
        x = x + masked(block.feed_forward(block.ffn_norm(x)), 2 + 2 * i, rate, whole)
    assert model.places == len(KEYS)
    torch.testing.assert_close(inner_states(model, KEYS, *batch), x)


def test_what_is_dropped_of_a_sequence_depends_on_neither_the_batch_nor_the_registers(random_model):
    model = random_model(layers=3, dropout=0.2)
    labels, codes, _ = batch_of(model)
    registers = registers_of(model)
    whole = inner_states(model, KEYS, labels, codes, *registers)
    torch.testing.assert_close(inner_states(model, KEYS, labels, codes), whole[:, :20])
    part = inner_states(model, KEYS[:, 1:], labels[1:], codes[1:], *(x[1:] for x in registers))
    torch.testing.assert_close(part, whole[1:])


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


def test_evaluation_is_deterministic_and_training_without_keys_drops_what_torchs_generator_says(random_model):
    model = random_model()
    labels, codes, _ = batch_of(model)
    assert torch.equal(model(labels, codes), model(labels, codes))
    model.train()
    found = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        found.append(model(labels, codes))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert not torch.equal(model(labels, codes), model(labels, codes))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_keys_are_of_one_forward_pass_in_training_mode(random_model, mode):
    model = random_model(layers=3, dropout=0.5 if mode == "eval" else 0.0)
    labels, codes, _ = batch_of(model)
    expected = model.run(labels, codes).states[3]
    getattr(model, mode)()
    assert torch.equal(model(within=lambda whole: whole.run(labels, codes).states[3], keys=KEYS), expected)
    with pytest.raises(ZeroDivisionError):
        model(within=lambda whole: 1 / 0, keys=KEYS)
    assert model.keys is None


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
