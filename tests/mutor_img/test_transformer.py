"""The transformer's initialisation, the facts that released weights depend on, its dropout, and what it refuses."""

import json
import math

import pytest
import torch
from reference import mutor as reference
from reference.comparison import batch_of, registers_of
from torch import nn

from mutor_img import mutor_loss
from mutor_img.attention import SdpaAttention
from mutor_img.blocks import PRESETS, Block, ModelConfig, RMSNorm, RotaryTable, rotate
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


def test_dropout_stands_after_the_embeddings_each_attention_and_each_feed_forward():
    model = Transformer(ModelConfig(3, 2, 32, (4, 5), 11, 3, dropout=0.1))
    places = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    blocks = {f"layers.{i}.{part}.dropout": 0.1 for i in range(3) for part in ("attention", "feed_forward")}
    assert places == {"dropout": 0.1, **blocks}


def test_a_drop_path_switches_the_dropouts_of_blocks_off_and_grows_with_depth():
    model = Transformer(ModelConfig(3, 2, 32, (4, 5), 11, 3, dropout=0.1, drop_path=0.2))
    places = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert places.pop("dropout") == 0.1 and set(places.values()) == {0.0}
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in model.layers]
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
