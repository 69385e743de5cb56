"""Mirai-E: which states are compared, what the gradients reach, and who the teacher is."""

import copy

import pytest
import torch
from readings import angle, losses, reached

from mutor_img.objectives.mirai import Mirai
from mutor_img.objectives.objective import Batch
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training.numbers import read_numbers

N, LAYERS, TAP = 20, 3, 2
LABELS = torch.tensor([0, 2])


@pytest.fixture
def model(random_model):
    """Three blocks on 4 x 5 codes with drawn weights; states are compared after the second."""
    model = random_model(register_offsets=None, layers=LAYERS)
    torch.manual_seed(0)
    model.objective = Mirai(model.config, offsets=(0, 1, 5))
    assert model.objective.teacher_taps == (TAP,)
    return model.eval()


@pytest.fixture
def batch(random_model):
    codes = torch.randint(11, (2, N), generator=torch.Generator().manual_seed(0))
    teacher = random_model(register_offsets=None, layers=LAYERS, seed=5)
    with torch.no_grad():
        return Batch(LABELS, codes[:, :-1], codes, teacher=teacher.run(LABELS, codes[:, :-1], taps=(TAP,)).states)


def test_each_loss_is_that_of_a_loop_over_its_pairs(model, batch):
    sums, terms = losses(model, batch), model.objective.terms(0, 0, torch.arange(2))
    states = model.run(batch.labels, batch.codes, taps=(TAP,)).states[TAP]
    for offset, rho in zip((0, 1, 5), model.objective.projectors):
        pairs = [(0, 0)] + [(t, t + offset) for t in range(1, N) if t + offset <= N - 1]
        expected = sum(-angle(rho(states[b, t]), batch.teacher[TAP][b, far]) for b in range(2) for t, far in pairs)
        assert sums[f"align_{offset}"].item() == pytest.approx(expected, abs=1e-4)
        assert terms[f"align_{offset}"] == 2 * len(pairs) == 2 * (N - offset)


def test_a_student_that_is_its_teacher_and_projects_nothing_away_has_a_loss_of_minus_one(model, batch):
    batch.teacher = model.run(batch.labels, batch.codes, taps=(TAP,)).states
    model.objective.projectors[0] = torch.nn.Identity()
    assert losses(model, batch)["align_0"].item() == pytest.approx(-2 * N, rel=1e-6)


def test_the_gradient_reaches_the_network_and_the_blocks_below_and_nothing_else(model, batch):
    sums = losses(model, batch)
    for offset, rho in zip((0, 1, 5), model.objective.projectors):
        loss = sums[f"align_{offset}"]
        for part in (rho, model.tok_embeddings, model.cls_embedding, *model.layers[:TAP]):
            assert reached(loss, part) == {True}
        for part in (*model.layers[TAP:], model.norm, model.output):
            assert reached(loss, part) == {False}


def test_states_are_compared_after_two_thirds_of_the_blocks(random_model):
    for layers, tap in ((12, 8), (24, 16), (36, 24), (6, 4)):
        config = random_model(layers=1).config
        assert Mirai(type(config)(layers, 2, 16)).teacher_taps == (tap,)
    assert Mirai(random_model().config).offsets == (0, 1, 5)


def test_the_weight_begins_late_and_falls_later(random_model):
    mirai = Mirai(random_model().config, offsets=(0, 1), starts_at=5, late_from=8)
    found = [mirai.weights(step, 99)["align_1"] for step in (0, 4, 5, 7, 8, 99)]
    assert found == [0.0, 0.0, 2.0, 2.0, 1.0, 1.0]
    assert Mirai(random_model().config).weights(10**6, 1) == {
        "next_token": 1.0, "align_0": 2.0, "align_1": 2.0, "align_5": 2.0}


OPTIONS = ("registers.kind=none", "objective.kind=mirai", "train.ema=0.9", "model.dropout=0.5",
           "model.class_dropout=1.0")


def test_the_teacher_is_the_runs_average_in_eval_mode_with_undropped_labels_and_stops_at_the_tap(run_training,
                                                                                                monkeypatch):
    seen, loss = [], GeneratorTask.loss

    def spy(task, model, step, samples, average):
        entered = []
        hooks = [part.register_forward_pre_hook(lambda part, inputs: entered.append((part.training, *inputs)))
                 for part in (average.cls_embedding, *average.layers)]
        found = loss(task, model, step, samples, average)
        for hook in hooks:
            hook.remove()
        seen.append((average, entered, task.data.batch(samples.numpy())[1]))
        assert not any(weight.grad is not None for weight in average.parameters())
        return found

    monkeypatch.setattr(GeneratorTask, "loss", spy)
    trainer = run_training(*OPTIONS)
    for average, entered, labels in seen:
        assert average is trainer.ema.module and not any(training for training, *_ in entered)
        assert torch.equal(entered[0][1], labels) and labels.max() < 3  # 3 is the null class
        assert len(entered) - 1 == max(trainer.task.model.objective.teacher_taps) == 1 < len(average.layers)


def test_the_logged_loss_is_that_against_the_average_of_the_updates_before(run_training):
    trainer = run_training(*OPTIONS, "model.dropout=0.0")
    task, samples = trainer.task, torch.arange(12, 16)
    other = copy.deepcopy(trainer.model).eval()
    by_average, by_model = (task.loss(trainer.model, 3, samples, teacher)[1] for teacher in (trainer.ema.module, other))
    logged = read_numbers(trainer.gradients())
    for name in ("align_0", "align_1", "align_4"):
        assert logged[name] == pytest.approx(by_average[name].item(), rel=1e-5)
        assert logged[name] != pytest.approx(by_model[name].item(), rel=1e-5)
