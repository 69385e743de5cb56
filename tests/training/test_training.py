"""Training resumes to the same bytes, refuses what is not finite, and does not depend on how a batch is cut."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import digest

from mutor_img.checkpoints import tensor_files
from mutor_img.checkpoints.folder import find_checkpoint, read_meta
from mutor_img.common import cli
from mutor_img.common.config import OptimConfig
from mutor_img.common.errors import UserError
from mutor_img.common.files import read_metrics
from mutor_img.pretraining.command import main
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training.optimizer import learning_rate
from mutor_img.training.runtime import Runtime
from mutor_img.training.task import Task

ROOT = Path(__file__).parents[2]


def losses(run_dir) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(run_dir)) if "loss" in row]


@pytest.mark.parametrize("extra", [(), ("train.ema=0.9", "model.dropout=0.2", "registers.count=null")])
def test_n_updates_equal_k_updates_and_a_resume_to_the_byte(run_training, tmp_path, extra):
    whole = run_training(f"run_dir={tmp_path}/whole", "train.steps=5", *extra)
    run_training(f"run_dir={tmp_path}/parts", "train.steps=2", *extra)
    parts = run_training(f"run_dir={tmp_path}/parts", "train.steps=5", *extra)
    assert digest(find_checkpoint(whole.run_dir)) == digest(find_checkpoint(parts.run_dir))
    assert losses(whole.run_dir) == losses(parts.run_dir)


def test_a_checkpoint_names_all_devices_that_its_seconds_were_spent_on(run_training, monkeypatch):
    meta = read_meta(find_checkpoint(run_training("train.steps=1").run_dir))
    assert meta["devices"] == ["CPU"]
    monkeypatch.setattr(Runtime, "devices", "2 x NVIDIA H100")
    for steps in (2, 3):
        meta = read_meta(find_checkpoint(run_training(f"train.steps={steps}").run_dir))
    assert meta["devices"] == ["CPU", "2 x NVIDIA H100"]


@pytest.mark.parametrize("dropped", [("model.dropout=0.3",), ("model.dropout=0.1", "model.drop_path=0.5")])
def test_gradient_accumulation_changes_nothing_but_rounding(run_training, tmp_path, dropped):
    for kind in ("registers.count=6", "registers.count=null"):
        whole = run_training(f"run_dir={tmp_path}/whole_{kind}", kind, *dropped)
        cut = run_training(f"run_dir={tmp_path}/cut_{kind}", kind, *dropped, "train.micro_batch=1")
        assert losses(cut.run_dir) == pytest.approx(losses(whole.run_dir), abs=1e-5)


def test_a_finished_run_is_left_alone(run_training, capsys):
    trainer = run_training()
    before = digest(find_checkpoint(trainer.run_dir))
    run_training()
    assert "nothing to do" in capsys.readouterr().out and digest(find_checkpoint(trainer.run_dir)) == before


def test_what_a_kill_left_of_the_last_save_is_done_though_no_update_is_left(run_training):
    root = run_training().run_dir / "checkpoints"
    whole = sorted(path.name for path in root.iterdir())
    (root / ".step_00000001.0.part").mkdir()
    (root / "latest").write_text("step_00000002\n")
    run_training()
    assert sorted(path.name for path in root.iterdir()) == whole
    assert (root / "latest").read_text() == "step_00000003\n"


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_taken_when_asked_for(run_file, run_training):
    whole = run_training("train.steps=4")
    before = digest(find_checkpoint(whole.run_dir))
    (find_checkpoint(whole.run_dir) / "optimizer.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"step_00000004/optimizer.*: damaged .*/step_00000003: .* --fallback"):
        run_training("train.steps=5")
    main(["--config", str(run_file), "train.steps=4", "--fallback"])
    assert digest(find_checkpoint(whole.run_dir)) == before
    assert (whole.run_dir / "checkpoints" / "damaged_step_00000004").is_dir()


def test_a_weight_that_is_not_finite_is_never_saved_and_the_step_is_named(run_training, monkeypatch, tmp_path):
    good = GeneratorTask.after_update

    def spoil(task, model, step, skipped):
        if step == 2:  # the null class: no loss of this update sees it
            model.cls_embedding.embedding_table.weight.data[-1, 0] = float("inf")
        return good(task, model, step, skipped)

    monkeypatch.setattr(GeneratorTask, "after_update", spoil)
    with pytest.raises(UserError, match=r"step 3: model cls_embedding\S* holds NaN or infinity.*step_00000002 is the"):
        run_training()
    assert find_checkpoint(tmp_path / "runs" / "run").name == "step_00000002"


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(run_training, monkeypatch, tmp_path):
    good = GeneratorTask.loss

    def broken(task, model, step, samples, average):
        loss, values = good(task, model, step, samples, average)
        return loss * (float("nan") if step == 2 else 1.0), values

    monkeypatch.setattr(GeneratorTask, "loss", broken)
    with pytest.raises(UserError, match=r"step 2: loss is nan.*step_00000002"):
        run_training()
    rows = [row["step"] for row in read_metrics(tmp_path / "runs" / "run")]
    assert rows == [1, 2] and read_meta(find_checkpoint(tmp_path / "runs" / "run"))["step"] == 2


def test_ema_follows_the_warmed_up_average(run_training, tmp_path):
    decay, average = 0.15, None  # reached at the second update
    for steps in range(4):
        trainer = run_training(f"run_dir={tmp_path}/r{steps}", f"train.steps={max(1, steps)}", f"train.ema={decay}",
                               f"optim.lr={1e-2 if steps else 1e-12}")
        weight = trainer.model.tok_embeddings.weight.detach().clone()
        if steps == 0:
            average = weight  # a learning rate of almost zero leaves the initial weights
        else:
            d = min(decay, steps / (9 + steps))  # (1 + n) / (10 + n) at the update n = steps - 1
            average = d * average + (1 - d) * weight
            assert torch.allclose(trainer.ema.module.tok_embeddings.weight, average, atol=1e-6)


def test_mirrored_views_and_null_classes_are_drawn(run_training):
    task = run_training("model.class_dropout=0.2").task
    _, labels, codes = task.batch(0, torch.arange(400))
    images = task.data.order.items(torch.arange(400).numpy())
    plain = torch.from_numpy(task.codes.codes[images, 0].astype("int64"))
    mirrored = (codes != plain).any(1).float().mean()
    assert 0.4 < mirrored < 0.6 and 0.1 < (labels == 3).float().mean() < 0.3


def decay(schedule, **length):
    """The settings of the one schedule that has such a length."""
    return length if schedule == "wsd" else {}


@pytest.mark.parametrize("schedule, at", [
    ("constant", {0: 0.25, 3: 1.0, 50: 1.0, 99: 1.0}),
    ("cosine", {0: 0.25, 3: 1.0, 51: 0.5573, 99: 0.1}),
    ("wsd", {0: 0.25, 3: 1.0, 79: 1.0, 90: 0.55}),
])
def test_learning_rate_schedules_at_chosen_steps(schedule, at):
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=3, final_lr=0.1, **decay(schedule, decay_steps=20))
    for step, expected in at.items():
        assert learning_rate(config, step, 100) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_a_learning_rate_below_the_last_one_stays(schedule):
    config = OptimConfig(lr=0.05, schedule=schedule, final_lr=0.1, **decay(schedule, decay_steps=20))
    assert {learning_rate(config, step, 100) for step in (0, 50, 90, 99)} == {0.05}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_a_restart_begins_the_whole_schedule_anew(schedule):
    """Each part of 30, 50 and 20 updates has the rates of a run of that length of its own."""
    one = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=3, final_lr=0.1, **decay(schedule, decay_share=0.2))
    config = replace(one, restarts=[30, 80, 100, 400])
    found = [learning_rate(config, step, 100) for step in range(100)]
    assert found == [learning_rate(one, step, length) for length in (30, 50, 20) for step in range(length)]
    if schedule == "wsd":  # a fifth of each part
        assert [found[step] for step in (3, 24, 27, 29, 33, 70, 75, 79)] == pytest.approx(
            [1.0, 1.0, 0.55, 0.25, 1.0, 1.0, 0.55, 0.19])


def test_weight_decay_spares_norms(run_training):
    trainer = run_training("train.steps=1")
    decayed, spared = (group["params"] for group in trainer.optimizer.param_groups)
    assert all(p.dim() >= 2 for p in decayed) and all(p.dim() == 1 for p in spared) and spared
    assert any(p is trainer.model.register_embedding.weight for p in decayed)
    decay = trainer.config.optim.weight_decay
    assert decay > 0 and [group["weight_decay"] for group in trainer.optimizer.param_groups] == [decay, 0.0]


def test_a_task_says_what_it_lacks_when_it_is_made():
    class Half(Task):
        def metadata(self):
            return {}

    with pytest.raises(TypeError, match=r"Half.*flops_per_sample.*loss"):
        Half()


def python(*arguments, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, **kwargs)


BAD = [
    (("train.global_batch=5", "train.micro_batch=2"), "train.micro_batch is 2"),
    (("data.codes=missing",), "missing: no codes here"),
    (("model.grid=[5,4]",), "grid"),
    (("model.vocabulary=17",), "vocabulary"),
    (("model.classes=4",), "classes"),
    (("registers.count=99",), "between 1 and 9"),
    (("registers.kind=3d",), "registers.kind is '3d'"),
    (("registers.embedding=each",), "registers.embedding"),
    (("registers.d_max=5",), "registers.d_max is 5"),
    (("model.preset=A",), "model.preset is 'A'"),
    (("registers.every=2",), "exclude each other"),
]


@pytest.mark.parametrize("overrides, message", BAD)
def test_a_run_that_cannot_be_is_refused_before_anything_is_written(run_training, tmp_path, overrides, message):
    with pytest.raises(UserError) as caught:
        run_training(*overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_codes_of_two_tokenizers_do_not_mix(run_training, make_codes, tmp_path):
    other = make_codes(tmp_path / "other", tokenizer_hash="b" * 64)
    with pytest.raises(UserError, match="tokenizer bbbbbbbbbbbb"):
        run_training(f"data.val_codes={other}")


def test_a_batch_that_does_not_divide_is_one_line_and_status_2(run_file):
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py",
                  "--config", run_file, "train.global_batch=3")
    line = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    assert len(line) == 1 and "not divisible by 2 processes" in line[0] and "use 2 or 4" in line[0]
    assert re.search(r"exitcode\s*: 2\b", done.stderr)


def test_a_users_mistake_is_one_line_and_status_2(run_file):
    done = python("train.py", "--config", run_file, "optim.lrr=1")
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0
    assert "did you mean 'optim.lr'" in done.stderr


def test_a_dry_run_prints_the_config_and_a_plan_and_writes_nothing(run_file, tmp_path, capsys):
    main(["--config", str(run_file), "--dry-run", "data.codes=nowhere"])
    printed = capsys.readouterr().out
    assert "global_batch: 4" in printed and "FLOPs per update" in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("parent, child, words", [
    ("", "eval: {every: 2}", ["eval.reference=r.npz"]),
    ("objective: {kind: rear}", "registers: {kind: none}\nobjective: {noise_until: 2}", []),
    ("", "objective: {kind: mirai}\nregisters: {kind: none}", ["train.ema=0.9"]),
])
def test_a_config_may_be_whole_only_with_what_extends_it_or_the_command_line(run_file, tmp_path, capsys, parent, child,
                                                                             words):
    (tmp_path / "parent.yaml").write_text(f"extends: {run_file}\n{parent}\n")
    (tmp_path / "child.yaml").write_text(f"extends: parent.yaml\n{child}\n")
    main(["--config", str(tmp_path / "child.yaml"), "--dry-run", *words])
    assert "FLOPs per update" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(run_training, monkeypatch, capsys):
    run_training("train.steps=1")

    def full(tensors, path, metadata):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda argv: run_training(), [])
    assert caught.value.code == 2 and "no space left" in capsys.readouterr().err


def test_a_micro_batch_is_no_larger_than_a_processs_share(run_training):
    assert run_training("train.micro_batch=64", "train.steps=1").micro_batch == 4


def test_metrics_are_json_lines_with_what_a_reader_needs(run_training, curves):
    trainer = run_training()
    rows = [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    needed = {"step", "samples", "loss", "next_token", "register", "gradient_norm", "lr", "tokens_per_second", "mfu"}
    assert [row["step"] for row in rows] == [1, 2, 3] and all(needed <= row.keys() for row in rows)
    assert rows[-1]["samples"] == 12 and (trainer.run_dir / "loss.png").stat().st_size > 1000
    assert list((trainer.run_dir / "tensorboard").glob("events*"))
