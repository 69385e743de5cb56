"""Parallel heads: what their gradients reach, which tokens they predict, and what they leave alone."""

import pytest
import torch
import torch.nn.functional as F
from readings import losses, reached

from mutor_img.objectives.objective import Batch
from mutor_img.objectives.parallel_heads import ParallelHeads


@pytest.fixture
def with_heads(random_model):
    """A factory: a model of two blocks on 4 x 5 codes of 11 with drawn weights, and its heads."""
    def build(**settings):
        model = random_model(register_offsets=None)
        torch.manual_seed(0)
        model.objective = ParallelHeads(model.config, **settings)
        return model.eval()

    return build


@pytest.fixture
def batch():
    codes = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(0))
    return Batch(torch.tensor([0, 2]), codes[:, :-1], codes)


def test_at_the_tap_before_it_a_heads_gradient_passes_the_last_block_by(with_heads, batch):
    model = with_heads(offsets=(2, 6))
    for name in ("head_2", "head_6"):
        loss = losses(model, batch)[name]
        assert reached(loss, model.layers[1]) == {False}
        for part in (model.layers[0], model.tok_embeddings, model.cls_embedding, model.norm, model.output):
            assert reached(loss, part) == {True}
    after = losses(with_heads(offsets=(2,), tap_from_end=0), batch)["head_2"]
    assert after.item() != losses(with_heads(offsets=(2,)), batch)["head_2"].item()


def test_a_head_that_copies_the_last_block_at_offset_one_is_the_next_token_head(with_heads, batch):
    model = with_heads(offsets=(1,))
    model.objective.heads[0].blocks[0].load_state_dict(model.layers[1].state_dict())
    sums = losses(model, batch)
    assert sums["head_1"].item() == sums["next_token"].item()


@pytest.mark.parametrize("own_output", [False, True])
@pytest.mark.parametrize("from_end, blocks", [(1, 1), (0, 2)])
@pytest.mark.parametrize("rows", [0, 7])
def test_a_heads_loss_is_that_of_a_loop_over_its_targets(with_heads, batch, from_end, blocks, own_output, rows):
    model = with_heads(offsets=(5, 2, 20), tap_from_end=from_end, blocks=blocks, own_output=own_output)
    if own_output:
        for head in model.objective.heads:
            torch.nn.init.normal_(head.output.weight)
    sums, terms = losses(model, batch, rows), model.objective.terms(0, 0, torch.arange(2))
    run = model.run(batch.labels, batch.codes, taps=(2 - from_end,))
    for offset, head in zip((2, 5, 20), model.objective.heads):
        x = run.states[2 - from_end]
        for block in head.blocks:
            x = block(x, run.rope, run.attend)
        logits = (head.output if own_output else model.output)(model.norm(x))
        expected = [F.cross_entropy(logits[b, t], batch.targets[b, t + offset - 1])  # x_{t+d} stands at t + d - 1
                    for b in range(2) for t in range(20) if t + offset <= 20]
        assert sums[f"head_{offset}"].item() == pytest.approx(sum(expected).item(), rel=1e-5)
        assert terms[f"head_{offset}"] == len(expected) == 2 * (20 - offset + 1)


def test_the_models_logits_do_not_depend_on_its_heads(with_heads, batch, random_model):
    alone = random_model(register_offsets=None)(batch.labels, batch.codes)
    assert torch.equal(with_heads(offsets=(2, 6))(batch.labels, batch.codes), alone)


def test_a_head_with_an_output_of_its_own_begins_at_the_uniform_guess(with_heads, batch):
    model = with_heads(offsets=(5,), tap_from_end=0, blocks=2, own_output=True)
    assert losses(model, batch)["head_5"].item() / (2 * 16) == pytest.approx(torch.tensor(11.0).log().item())


def test_the_weights_are_a_mean_over_heads(random_model):
    heads = ParallelHeads(random_model().config, offsets=(2, 3, 4), weight=0.3)
    assert heads.weights(0, 10) == pytest.approx({"next_token": 0.7, "head_2": 0.1, "head_3": 0.1, "head_4": 0.1})
