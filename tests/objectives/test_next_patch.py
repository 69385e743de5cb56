"""Next-patch prediction: what a patch is read as, what a row predicts and has read, and when the stages change."""

import pytest
import torch
import torch.nn.functional as F
from readings import losses

from mutor_img.attention import SdpaAttention
from mutor_img.blocks import ModelConfig, RotaryTable
from mutor_img.common.config import load_config
from mutor_img.objectives.next_patch import NextPatch
from mutor_img.objectives.objective import Batch, Objective
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training.runtime import Runtime

ROWS, COLUMNS, V = 4, 6, 11
STAGES = {0: 2, 1: 2, 2: 1, 9: 1}  # update: patch side


@pytest.fixture
def model(random_model):
    model = random_model((ROWS, COLUMNS), register_offsets=None)
    model.objective = NextPatch(model.config, stage_ends=[2])
    return model


@pytest.fixture
def codes():
    return torch.randint(V, (3, ROWS * COLUMNS), generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 2, 3])


def prepared(model, codes):
    return model.objective.prepare(0, 0, torch.arange(3), LABELS, codes)


def patches_of(codes):
    """Return by patch, in raster order, its four codes (B, 4)."""
    cells = codes.view(-1, ROWS, COLUMNS)
    return [torch.stack([cells[:, i, j], cells[:, i, j + 1], cells[:, i + 1, j], cells[:, i + 1, j + 1]], dim=1)
            for i in range(0, ROWS, 2) for j in range(0, COLUMNS, 2)]


@pytest.mark.parametrize("rows", [0, 7])
def test_the_loss_is_that_of_a_loop_over_patches_and_their_codes(model, codes, rows):
    patches, embed = patches_of(codes), model.tok_embeddings
    x = torch.stack([model.cls_embedding(LABELS), *(sum(embed(patch[:, i]) for i in range(4)) / 4
                                                    for patch in patches[:-1])], dim=1)  # (B, P, dim)
    rope = RotaryTable((2, 3), model.config.dim // model.config.heads)(torch.arange(6))[None]
    for layer in model.layers:
        x = layer(x, rope, SdpaAttention(6))
    log_p = model.output(model.norm(x)).log_softmax(-1)  # (B, P, V)
    expected = [-log_p[b, j, patches[j][b, i]] for b in range(3) for j in range(6) for i in range(4)]
    found = losses(model, prepared(model, codes), rows)["next_patch"]
    assert found.item() == pytest.approx(sum(expected).item(), rel=1e-5)
    assert model.objective.terms(0, 0, torch.arange(3)) == {"next_patch": len(expected)}


def test_patches_of_equal_codes_are_the_codes_of_a_smaller_grid(model, random_model):
    few = torch.randint(V, (3, 6), generator=torch.Generator().manual_seed(1))
    each = few.view(3, 2, 3).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1)  # (B, N)
    small = random_model((2, 3), register_offsets=None)
    expected = Objective(small.config)(small, Batch(LABELS, few[:, :-1], few))["next_token"]
    assert losses(model, prepared(model, each))["next_patch"].item() == pytest.approx(4 * expected.item(), rel=1e-5)


def test_a_row_has_read_the_patches_before_its_own_and_no_more_rows_than_patches_reach_the_head(model, codes,
                                                                                                 monkeypatch):
    read = []
    monkeypatch.setattr(model.objective, "read_out",
                        lambda x, norm, head, targets, rows: read.append(head(norm(x))) or [F.relu(x).sum()])
    changed = codes.clone()
    changed[:, 2] = (changed[:, 2] + 1) % V  # a code of the patch after the first one
    for each in (codes, changed):
        losses(model, prepared(model, each))
    moved = (read[0] - read[1]).abs().amax(dim=(0, 2))  # (P,)
    assert moved[:2].max() == 0 and moved[2] > 1e-4 and read[0].shape[1] == 6


def test_the_stage_is_a_function_of_the_update(model, codes):
    for step, side in STAGES.items():
        batch = model.objective.prepare(0, step, torch.arange(3), LABELS, codes)
        assert batch.side == side and batch.targets.shape[1] == ROWS * COLUMNS // side**2
        assert list(model.objective.weights(step, 99)) == ["next_patch" if side == 2 else "next_token"]
    three = NextPatch(ModelConfig(1, 2, 16, (8, 8)), patches=[4, 2, 1], stage_ends=[75, 150])
    assert [three.side(step) for step in (0, 74, 75, 149, 150, 10**6)] == [4, 4, 2, 2, 1, 1]


@pytest.mark.parametrize("patches, ends, share", [([2, 1], [9], 0.246), ([4, 2, 1], [9, 10], 0.061)])
def test_the_first_stage_costs_what_the_shorter_sequence_does(patches, ends, share):
    config = ModelConfig.preset("B")
    whole = -NextPatch(config, patches, ends).extra_flops(0)[0] / (1 - share)
    assert whole == pytest.approx(51.14e9, rel=0.01)
    assert NextPatch(config, patches, ends).extra_flops(10**6) == (0.0, 0.0)


def test_the_flops_of_an_update_are_those_of_its_stage(run_file, tiny):
    options = ["registers.kind=none", "objective.kind=npp", "objective.stage_ends=[2]"]
    task = GeneratorTask(load_config(GeneratorConfig, run_file, options), Runtime.start())
    assert task.flops_per_sample(1) < 0.3 * task.flops_per_sample(2)
    assert task.headline == ("loss", "next_patch", "next_token", "val_next_token")
