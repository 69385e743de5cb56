"""Losses on held-out codes, against loops over cells of the grid."""

import pytest
import torch

from mutor_img.common.config import load_config
from mutor_img.data.store import Codes
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.held_out import next_token_loss, target_losses
from mutor_img.pretraining.plan import plan_generator, run_flops, run_parameters
from mutor_img.registers import RegisterLaw
from mutor_img.training.runtime import Runtime

ROWS, COLUMNS = 4, 5
RUNTIME = Runtime(torch.device("cpu"))


@pytest.fixture
def model(random_model):
    return random_model((ROWS, COLUMNS), vocabulary=16)


def one_by_one(model, codes, down, right, count):
    """The loss per register of one target, a register and a sequence at a time, in rows and columns."""
    losses = []
    for image in range(count):
        tokens = torch.tensor(codes.codes[image, 0].astype("int64"))  # (N,)
        for row in range(ROWS):
            for column in range(COLUMNS):
                if row + down >= ROWS or column + right >= COLUMNS:
                    continue
                anchor = row * COLUMNS + column + 1  # after the code of this cell
                offset = down * COLUMNS + right
                _, logits = model(torch.tensor([codes.labels[image]]), tokens[None, :-1], torch.tensor([[anchor]]),
                                  torch.tensor([[offset]]))
                wanted = tokens[(row + down) * COLUMNS + column + right]
                losses.append(-logits[0, 0].log_softmax(-1)[wanted])
    return torch.stack(losses).mean().item()


LAWS = [RegisterLaw("2d", (ROWS, COLUMNS), d_max=2), RegisterLaw("1d", (ROWS, COLUMNS), d_max=3),
        RegisterLaw("2d", (ROWS, COLUMNS), d_max=2, count=3, wrap=False, mixed=True),
        RegisterLaw("set", (ROWS, COLUMNS), chosen=(7, 2))]


@pytest.mark.parametrize("law", LAWS)
@torch.no_grad()
def test_the_loss_per_target_is_that_of_a_loop_over_cells(model, codes_folder, law):
    codes = Codes(codes_folder)
    found = target_losses(model, law, codes, 3, 2, RUNTIME)
    assert [(f.down, f.right) for f in found] == [divmod(d, COLUMNS) for d in law.offsets]
    for down, right, loss in found:
        assert loss == pytest.approx(one_by_one(model, codes, down, right, 3), rel=1e-5)


@torch.no_grad()
def test_neither_batches_nor_chunks_nor_processes_change_a_loss(model, codes_folder):
    codes, law = Codes(codes_folder), RegisterLaw("2d", (ROWS, COLUMNS), d_max=2)
    whole = target_losses(model, law, codes, 10, 10, RUNTIME)
    for size, rows in ((3, 0), (10, 7)):
        assert [t.loss for t in target_losses(model, law, codes, 10, size, RUNTIME, rows)] == pytest.approx(
            [t.loss for t in whole], rel=1e-5)
    assert next_token_loss(model, model.config, codes, 3, RUNTIME) == pytest.approx(
        next_token_loss(model, model.config, codes, 10, RUNTIME, 4), rel=1e-6)


@torch.no_grad()
def test_an_offset_past_every_target_is_left_out(model, codes_folder):
    law = RegisterLaw("set", (ROWS, COLUMNS), chosen=(1, ROWS * COLUMNS))
    assert [(t.down, t.right) for t in target_losses(model, law, Codes(codes_folder), 2, 2, RUNTIME)] == [(0, 1)]


@torch.no_grad()
def test_the_next_token_loss_is_that_of_the_model_s_logits(model, codes_folder):
    codes = Codes(codes_folder)
    tokens = torch.from_numpy(codes.codes[:, 0].astype("int64"))
    logits = model(torch.from_numpy(codes.labels[:]), tokens[:, :-1])
    picked = logits.log_softmax(-1).gather(2, tokens[..., None])
    assert next_token_loss(model, model.config, codes, 4, RUNTIME) == pytest.approx(-picked.mean().item(), rel=1e-6)


def test_flops_of_a_run_whose_stages_differ_are_those_of_each_stage():
    config = load_config(GeneratorConfig, "imagenet256/npp_b", ["objective.stage_ends=[100]", "train.steps=400"])
    plain = run_flops(load_config(GeneratorConfig, "imagenet256/ntp_b"), 1)
    per_sequence = config.train.global_batch / load_config(GeneratorConfig, "imagenet256/ntp_b").train.global_batch
    assert run_flops(config, 100) == pytest.approx(0.246 * 100 * plain * per_sequence, rel=0.01)
    assert run_flops(config, 400) - run_flops(config, 100) == pytest.approx(300 * plain * per_sequence, rel=1e-6)


@pytest.mark.parametrize("name", ["ntp_b", "mutor2d_b_80", "mtar_b"])
def test_flops_and_parameters_of_a_run_are_those_of_its_plan(name):
    config = load_config(GeneratorConfig, f"imagenet256/{name}")
    plan = plan_generator(config)
    time = next(rows for title, rows in plan.items() if title.startswith("time at"))
    assert run_flops(config, config.train.steps) == pytest.approx(time["FLOPs in all"])
    assert 2 * run_flops(config, 10) == pytest.approx(run_flops(config, 20))
    sampled, trained = run_parameters(config)
    registers = 768 if name == "mutor2d_b_80" else 0
    assert sampled == run_parameters(load_config(GeneratorConfig, "imagenet256/ntp_b"))[0]  # all sample the same model
    assert sampled + registers == plan["model"]["parameters"]
    assert trained == plan["model"]["parameters"] + plan["model"]["of the objective, dropped after training"]
