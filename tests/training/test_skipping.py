"""A loss that is not finite: the update moves nothing, may be skipped so many times, and is known late on a GPU."""

import math
from pathlib import Path

import pytest
import torch

from mutor_img.checkpoints.folder import find_checkpoint, read_tensors
from mutor_img.common.config import load_config
from mutor_img.common.errors import UserError
from mutor_img.common.files import read_metrics
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training import updates
from mutor_img.training.optimizer import optimizer_tensors
from mutor_img.training.runtime import Runtime
from mutor_img.training.trainer import WINDOW, Trainer
from tokenizer.train import TokenizerConfig, TokenizerTask

CPU = Runtime(torch.device("cpu"))
TOKENIZER = """
data: {{images: {images}, image_size: 16, crop_min: 1.0, workers: 1}}
model: {{preset: mnist, channels: 8, vocabulary: 32, code_dim: 4}}
loss: {{adversarial_weight: 0.5, adversarial_start: 0, discriminator_channels: 4, discriminator_layers: 1}}
revival: {{after: 1, until: 1.0}}
train: {{steps: 9, global_batch: 8, micro_batch: 4, precision: fp32, compile: false, ema: 0.9}}
"""


@pytest.fixture
def spoil(monkeypatch):
    """Return a function that makes the loss of some updates NaN, counted from 0."""
    good = {task: task.loss for task in (GeneratorTask, TokenizerTask)}

    def spoilt(*steps):
        for task, loss in good.items():
            def broken(self, model, step, samples, average=None, loss=loss):
                total, values = loss(self, model, step, samples, average)
                return total * (math.nan if step in steps else 1.0), values

            monkeypatch.setattr(task, "loss", broken)

    return spoilt


@pytest.fixture
def build(run_file, digit_folders, tmp_path, tiny):
    """Return a function that builds a Trainer that may skip one update."""
    (tmp_path / "tokenizer.yaml").write_text(TOKENIZER.format(images=digit_folders["train"]))
    kinds = {"registers": (run_file, "train.micro_batch=2"),
             "mirai": (run_file, "registers.kind=none", "objective.kind=mirai"),
             "tokenizer": (tmp_path / "tokenizer.yaml",)}

    def built(kind, run="run") -> Trainer:
        path, *overrides = kinds[kind]
        task, schema = (TokenizerTask, TokenizerConfig) if kind == "tokenizer" else (GeneratorTask, GeneratorConfig)
        config = load_config(schema, path, [f"run_dir={tmp_path / run}", "train.ema=0.9", "train.skip_bad_updates=1",
                                            "train.steps=9", *overrides])
        return Trainer(task(config, CPU), config, CPU)

    return built


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return copies of all that a checkpoint holds."""
    groups = {"model": trainer.model.state_dict(), "ema": trainer.ema.module.state_dict(),
              "optimizer": optimizer_tensors(trainer.model, trainer.optimizer), **trainer.task.tensors()}
    return {f"{group} {name}": tensor.clone() for group, tensors in groups.items() for name, tensor in tensors.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["registers", "mirai", "tokenizer"])
def test_a_skipped_update_leaves_the_run_as_if_only_its_number_had_passed(build, spoil, kind):
    spoil(2)
    trainer, other = build(kind), build(kind, "other")
    for _ in range(2):
        trainer.update(), other.update()
    before = state(trainer)
    assert math.isnan(trainer.update()["loss"]) and trainer.step == 3 and trainer.skipped == [3]
    assert same(state(trainer), before)
    other.step = 3
    trainer.update(), other.update()
    assert same(state(trainer), state(other)) and not same(state(trainer), before)


def test_the_first_update_may_be_skipped(build, spoil):
    spoil(0)
    trainer = build("registers")
    weights = [weight.clone() for weight in trainer.model.parameters()]
    trainer.update()
    assert all(map(torch.equal, weights, trainer.model.parameters())) and trainer.skipped == [1]


def test_a_skipped_update_is_told_by_its_step_and_counts_after_a_resume(run_training, spoil, capsys):
    spoil(1, 3)
    run = run_training("train.steps=3", "train.skip_bad_updates=1")
    with pytest.raises(UserError, match=r"step 3: loss is nan; nothing was updated, 1 of the 1000 .*step_00000003"):
        run_training("train.steps=5", "train.skip_bad_updates=1")
    assert "warning: step 2: loss is nan; this update was skipped" in capsys.readouterr().out
    rows = read_metrics(run.run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[1] == {"step": 2, "skipped": 1}


def test_so_many_updates_may_be_skipped_among_the_last_thousand(build):
    trainer = build("registers")
    for step in (1, WINDOW + 1):
        assert ": 1 of 1 in 1000 updates)" in trainer.judge(step, {"loss": math.inf, "skipped": 1.0})
    with pytest.raises(UserError, match=f"step {2 * WINDOW - 1}: loss is inf"):
        trainer.judge(2 * WINDOW, {"loss": math.inf, "skipped": 1.0})


def seen(run_dir: Path) -> tuple:
    """Return what a run has left: every tensor of its newest checkpoint, and its log but for times."""
    folder = find_checkpoint(run_dir)
    rows = [{name: value for name, value in row.items() if "per_second" not in name and name != "mfu"}
            for row in read_metrics(run_dir)]
    return folder.name, rows, {f"{group} {name}": tensor for group in ("model", "ema", "optimizer")
                               for name, tensor in read_tensors(folder, group).items()}


@pytest.mark.parametrize("log_every", [1, 3])
def test_numbers_that_are_read_while_the_next_update_is_under_way_change_nothing(run_training, spoil, monkeypatch,
                                                                                tmp_path, log_every):
    spoil(1, 4)
    found = []
    for behind in (0, 1):
        monkeypatch.setattr(updates, "behind", lambda device, behind=behind: behind)
        run = run_training(f"run_dir={tmp_path}/{behind}", "train.steps=8", "train.checkpoint_every=5", "train.ema=0.9",
                           "train.skip_bad_updates=2", "train.validate_every=3", f"train.log_every={log_every}")
        found.append(seen(run.run_dir))
    assert found[0][:2] == found[1][:2] and same(found[0][2], found[1][2])
    assert sum("skipped" in row for row in found[0][1]) == 2


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_a_loss_that_is_known_late_to_be_none_is_named_by_its_step_and_nothing_is_saved(run_training, spoil, bad,
                                                                                       monkeypatch, tmp_path):
    monkeypatch.setattr(updates, "behind", lambda device: 1)
    spoil(bad)
    with pytest.raises(UserError, match=f"step {bad}: loss is nan; nothing was updated"):
        run_training("train.steps=4", "train.checkpoint_every=2")
    saved = sorted(path.name for path in (tmp_path / "runs" / "run" / "checkpoints").glob("step_*"))
    assert saved == (["step_00000002"] if bad >= 2 else [])
