"""The attention rule cell by cell, its two backends against it, and compiled FlexAttention over many draws."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from reference import mutor as reference
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from mutor_img import draw_registers
from mutor_img.attention import BLOCK, FlexAttention, SdpaAttention, may_attend
from mutor_img.blocks import Block, ModelConfig, RotaryTable
from mutor_img.training.compiling import compile_blocks

pytestmark = pytest.mark.usefixtures("usual_limits")
PLACEMENTS = {"dense": {}, "sparse": {"count": 4}, "every": {"every": 3}}
LENGTHS = [((10, 10), 60), ((10, 15), 33), ((16, 16), 80)]  # N + R = 160, 183, 336: no multiples of 128


def anchors_of(grid, count=None, step=0, batch=2, **switches):
    return draw_registers("1d", count, 4, grid, 0, step, torch.arange(batch), **switches)[0]


def qkv(length, batch=2, heads=2, head_dim=16, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, length, head_dim, generator=generator).to(**options).unbind()


def brute(q, k, v, anchors, tokens):
    return torch.stack([torch.stack([
        reference.masked_attention(q[b, h], k[b, h], v[b, h], reference.packed_mask(anchors[b].tolist(), tokens))
        for h in range(q.shape[1])]) for b in range(len(q))])


def rule_of(anchors, tokens):
    """may_attend on every cell: (B, N + R, N + R)."""
    places = torch.arange(tokens + anchors.shape[1])
    full = torch.cat([torch.full((len(anchors), tokens), -1), anchors], dim=1)
    return may_attend(places[:, None], places, full[:, :, None], tokens)


# ---- the rule


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_rule_equals_the_mask_filled_cell_by_cell(placement):
    anchors = anchors_of((4, 5), **PLACEMENTS[placement])
    expected = torch.stack([reference.packed_mask(row, 20) for row in anchors.tolist()])
    assert torch.equal(rule_of(anchors, 20), expected)


def test_the_rule_written_out_for_three_inputs_and_three_registers():
    rows = ["100 000", "110 000", "111 000",  # c, x_1, x_2
            "111 100", "100 010", "110 001"]  # registers after x_2, c, x_1
    expected = torch.tensor([[cell == "1" for cell in row if cell != " "] for row in rows])
    assert torch.equal(rule_of(torch.tensor([[2, 0, 1]]), 3)[0], expected)


def test_the_packed_rule_is_the_interleaved_rule_reordered():
    anchors, offsets = [7, 0, 7, 3], [1, 2, 5, 17]
    sequence = reference.interleave(anchors, offsets, 20)
    order = [token.anchor if token.register is None else 20 + token.register for token in sequence]
    assert torch.equal(rule_of(torch.tensor([anchors]), 20)[0][order][:, order], reference.dense_mask(sequence))


def test_a_regular_input_never_sees_a_register_whatever_the_anchor_says():
    for anchor in (-5, 0, 3, 19, 1000):
        for query in range(20):
            seen = may_attend(torch.tensor(query), torch.arange(40), torch.tensor(anchor), 20)
            assert seen.nonzero().flatten().tolist() == list(range(query + 1))


def test_a_register_never_sees_another_register_whatever_the_anchor_says():
    for anchor in (0, 3, 19, 20, 1000):
        for query in range(20, 40):
            seen = may_attend(torch.tensor(query), torch.arange(40), torch.tensor(anchor), 20)
            assert seen.nonzero().flatten().tolist() == [*range(min(anchor + 1, 20)), query]


# ---- SDPA


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("grid", [(4, 5), (3, 7)])
def test_sdpa_equals_the_rule_evaluated_densely_outputs_and_gradients(placement, grid):
    tokens = grid[0] * grid[1]
    anchors = anchors_of((4, 5), **PLACEMENTS[placement]) if grid == (4, 5) else torch.tensor([[0, 20, 3], [5, 5, 5]])
    leaves = [x.requires_grad_() for x in qkv(tokens + anchors.shape[1], dtype=torch.float64)]
    mine, theirs = SdpaAttention(tokens, anchors)(*leaves), brute(*leaves, anchors, tokens)
    torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)
    weights = torch.randn_like(mine)
    for a, b in zip(torch.autograd.grad(mine, leaves, weights), torch.autograd.grad(theirs, leaves, weights),
                    strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_sdpa_without_registers_is_plain_causal():
    q, k, v = qkv(20, dtype=torch.float64)
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    torch.testing.assert_close(SdpaAttention(20)(q, k, v), brute(q, k, v, nothing, 20), atol=1e-10, rtol=0)


def output_and_gradients(attend, q, k, v):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    output = attend(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return [output, *torch.autograd.grad(output, leaves, weights.to(output.dtype))]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("head_dim, tokens, chosen", [
    (16, 64, torch.float32), (64, 120, torch.bfloat16), (64, 70, torch.float32), (100, 128, torch.bfloat16)])
def test_training_in_bf16_on_a_cpu_attends_in_fp32_where_heads_are_small(head_dim, tokens, chosen, compiled):
    """The kernel is slow backward for small heads in bf16, which autocast would choose whatever it is given."""
    attend = SdpaAttention(tokens, torch.arange(tokens).expand(2, -1))

    def attend_in(dtype):
        def run(*x):
            q, k, v = (y.to(dtype) for y in x)
            regular = F.scaled_dot_product_attention(*(y[:, :, :tokens] for y in (q, k, v)), is_causal=True)
            register = F.scaled_dot_product_attention(q[:, :, tokens:], k, v, attend.mask)
            return torch.cat([regular, register], dim=2).bfloat16()

        return run

    inputs = qkv(2 * tokens, head_dim=head_dim, dtype=torch.bfloat16)
    known = {dtype: output_and_gradients(attend_in(dtype), *inputs) for dtype in (torch.float32, torch.bfloat16)}
    assert not torch.equal(*(tensors[1] for tensors in known.values()))
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        runner = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
        found = output_and_gradients(runner, *inputs)
        with torch.no_grad():  # sampling and validation have no backward pass
            assert torch.equal(attend(*inputs), known[torch.bfloat16][0])
    for mine, expected in zip(found, known[chosen], strict=True):
        assert mine.dtype == torch.bfloat16 and torch.equal(mine, expected)


# ---- FlexAttention's block lists


def listed_blocks(flex):
    """(query blocks, key blocks) of bool: where a kernel looks at all."""
    return flex.block_mask.to_dense().bool()[0, 0]


@pytest.mark.parametrize("grid, count", [*LENGTHS, ((8, 16), 80), ((16, 16), 128), ((5, 5), 3), ((8, 8), 20)])
def test_the_union_mask_lists_every_block_that_any_draw_can_touch_and_calls_none_full(grid, count):
    tokens = grid[0] * grid[1]
    flex = FlexAttention(tokens, anchors_of(grid, count), fixed_anchors=False)
    listed = listed_blocks(flex)
    for anchors in (torch.full((1, count), tokens - 1), torch.zeros(1, count, dtype=torch.int64)):
        for q, k in set(map(tuple, (rule_of(anchors, tokens)[0].nonzero() // BLOCK).tolist())):
            assert listed[q, k]
    assert flex.block_mask.full_kv_num_blocks is None  # a full block would skip the rule
    assert flex.block_mask.seq_lengths == (tokens + count, tokens + count)


def test_the_union_mask_lists_no_block_that_no_draw_can_touch():
    flex = FlexAttention(256, anchors_of((16, 16), 80), fixed_anchors=False)
    assert listed_blocks(flex).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    flex = FlexAttention(256, torch.zeros(2, 256, dtype=torch.int64), fixed_anchors=False)
    assert listed_blocks(flex).tolist() == [
        [True, False, False, False], [True, True, False, False], [True, True, True, False], [True, True, False, True]]


@pytest.mark.parametrize("grid, every", [((16, 16), None), ((16, 16), 2), ((10, 15), None), ((10, 15), 3)])
def test_fixed_anchors_have_exact_blocks_full_where_all_is_allowed_and_unlisted_where_nothing_is(grid, every):
    tokens, anchors = grid[0] * grid[1], anchors_of(grid, every=every)
    flex = FlexAttention(tokens, anchors, fixed_anchors=True)
    rule, mask, listed = rule_of(anchors, tokens)[0], flex.block_mask, listed_blocks(flex)
    for i, j in product(range(len(listed)), repeat=2):
        cells = rule[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        full = j in mask.full_kv_indices[0, 0, i, : int(mask.full_kv_num_blocks[0, 0, i])].tolist()
        assert bool(listed[i, j]) == bool(cells.any())
        assert not full or cells.all()


def test_updating_anchors_overwrites_the_tensor_that_the_rule_captured():
    first, second = anchors_of((10, 10), 60), anchors_of((10, 10), 60, step=1)
    flex = FlexAttention(100, first, fixed_anchors=False)
    captured, place, mask = flex.anchors, flex.anchors.data_ptr(), flex.block_mask
    flex.update(second)
    assert flex.anchors is captured and flex.anchors.data_ptr() == place and flex.block_mask is mask
    assert torch.equal(flex.anchors, second) and not torch.equal(first, second)


def test_flex_attention_does_not_write_into_the_anchors_it_was_built_from():
    first, second = anchors_of((10, 10), 60), anchors_of((10, 10), 60, step=1)
    before = first.clone()
    FlexAttention(100, first, fixed_anchors=False).update(second)
    assert torch.equal(first, before)


# ---- FlexAttention, compiled


def compiled_flex():
    """FlexAttention's call, compiled as in training: fixed shapes, no graph break. Returns it and its counter."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    return torch.compile(lambda flex, q, k, v: flex(q, k, v), backend=counter, dynamic=False, fullgraph=True), counter


def flex_error(run, flex, anchors, tokens, seed=0):
    inputs = qkv(tokens + anchors.shape[1], seed=seed)
    with torch.no_grad():
        return (run(flex, *inputs) - SdpaAttention(tokens, anchors)(*inputs)).abs().max().item()


@pytest.mark.parametrize("grid, count", LENGTHS)
def test_compiled_flex_equals_sdpa_over_ten_draws_with_one_mask_and_one_compilation(grid, count):
    tokens = grid[0] * grid[1]
    run, counter = compiled_flex()
    flex = FlexAttention(tokens, anchors_of(grid, count), fixed_anchors=False)
    for step in range(10):
        anchors = anchors_of(grid, count, step)
        flex.update(anchors)
        assert flex_error(run, flex, anchors, tokens, seed=step) < 2e-6
    assert counter.frame_count == 1
    late = torch.full((2, count), tokens - 1)  # the widest that a draw can be
    assert flex_error(run, flex, late, tokens) > 1e-2  # not updated: wrong, so that the comparison can fail
    flex.update(late)
    assert flex_error(run, flex, late, tokens) < 2e-6
    assert counter.frame_count == 1


def test_the_result_of_compiled_flex_lies_in_memory_as_the_output_projection_reads_it():
    run, _ = compiled_flex()
    flex = FlexAttention(100, anchors_of((10, 10), 60), fixed_anchors=False)
    with torch.no_grad():
        assert run(flex, *qkv(160)).transpose(1, 2).is_contiguous()  # else heads would be put together by a copy


def test_compiled_flex_with_the_exact_blocks_of_one_draw_is_wrong_at_another():
    """Why drawn anchors need the union of blocks: the block lists of one draw are not valid for the next."""
    run, _ = compiled_flex()
    early, late = torch.zeros(2, 60, dtype=torch.int64), torch.full((2, 60), 255)
    flex = FlexAttention(256, early, fixed_anchors=True)
    assert flex_error(run, flex, early, 256) < 2e-6
    flex.update(late)
    assert flex_error(run, flex, late, 256) > 1e-2


def test_compiled_flex_with_dense_registers_equals_sdpa():
    run, counter = compiled_flex()
    anchors = anchors_of((10, 15))
    flex = FlexAttention(150, anchors, fixed_anchors=True)
    for step in range(3):
        flex.update(anchors)
        assert flex_error(run, flex, anchors, 150, seed=step) < 2e-6
    assert counter.frame_count == 1


# ---- compiled blocks of the model


def block_inputs(grid, count, step):
    anchors = anchors_of(grid, count, step)
    tokens = grid[0] * grid[1]
    x = torch.randn(2, tokens + count, 32, generator=torch.Generator().manual_seed(step))
    ids = torch.cat([torch.arange(tokens).expand(2, -1), anchors], dim=1)
    return x, RotaryTable(grid, 16)(ids), SdpaAttention(tokens, anchors)


def test_many_blocks_with_stochastic_depth_are_all_compiled(random_model):
    """Each has a drop rate of its own, a constant to the compiler; at torch's own limit of 8 the rest run eagerly."""
    counter = CompileCounter()
    model = random_model(layers=9, drop_path=0.1).train()
    compile_blocks(model.layers, counter)
    labels, codes = torch.tensor([0, 1]), torch.randint(11, (2, 19))
    for step in range(2):
        model(labels, codes, *draw_registers("2d", 4, 3, (4, 5), 0, step, torch.arange(2)))
    assert counter.frame_count == 9


def test_blocks_that_are_compiled_too_often_are_an_error_not_slow(random_model):
    model = random_model(layers=1)
    compile_blocks(model.layers, "eager")
    labels, codes = torch.tensor([0, 1]), torch.randint(11, (2, 19))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for count in range(2, 19):
            model(labels, codes, *draw_registers("1d", count, 2, (4, 5), 0, 0, torch.arange(2)))


@pytest.mark.parametrize("train", [False, True])
def test_a_block_compiles_without_a_graph_break_once_for_ten_steps_of_fresh_masks(train):
    torch._dynamo.reset()
    counter = CompileCounter()
    block = Block(ModelConfig(2, 2, 32, (4, 5), 11, 3, dropout=0.0), drop_path=0.0).train(train)
    run = torch.compile(block, backend=counter, dynamic=False, fullgraph=True)
    for step in range(10):
        inputs = block_inputs((4, 5), 5, step)
        torch.testing.assert_close(run(*inputs), block(*inputs))
    assert counter.frame_count == 1
    for step in range(3):
        run(*block_inputs((4, 5), 3, step))
    assert counter.frame_count == 2  # once more for the other shape, and no more


def test_the_blocks_of_a_model_share_one_compilation(random_model):
    torch._dynamo.reset()
    counter = CompileCounter()
    model = random_model(layers=3)
    labels, codes = torch.tensor([0, 1]), torch.randint(11, (2, 19))
    for layer in model.layers:
        layer.compile(backend=counter, dynamic=False, fullgraph=True)
    for step in range(4):
        anchors, offsets = draw_registers("2d", 4, 3, (4, 5), 0, step, torch.arange(2))
        model(labels, codes, anchors, offsets)
    assert counter.frame_count == 1


def test_compiled_blocks_with_flex_give_the_logits_of_sdpa_over_many_draws(random_model):
    model = random_model(grid=(8, 10), dim=64)
    labels, codes = torch.tensor([0, 2]), torch.randint(11, (2, 79))
    draws = [draw_registers("2d", 30, 3, (8, 10), 0, step, torch.arange(2)) for step in range(4)]
    with torch.no_grad():
        expected, alone = [model(labels, codes, *draw) for draw in draws], model(labels, codes)
        model.use_flex(draws[0][0], fixed=False)
        torch.testing.assert_close(model(labels, codes), alone)  # without registers FlexAttention has no part
        compile_blocks(model.layers)
        found = [model(labels, codes, *draw) for draw in draws]
    for one, two in zip(expected, found):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one, two))
