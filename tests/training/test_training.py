"""Training resumes to the same bytes, refuses what is not finite, and does not depend on how a batch is cut."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mutor_img import blocks
from mutor_img.checkpoints import folder as checkpoint
from mutor_img.checkpoints import tensor_files
from mutor_img.checkpoints.folder import find_checkpoint, newest_checkpoint, read_meta, read_tensors
from mutor_img.common import cli, files
from mutor_img.common.config import OptimConfig, load_config
from mutor_img.common.errors import UserError
from mutor_img.pretraining import task as generator
from mutor_img.pretraining.command import main
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training import command
from mutor_img.training.log import read_metrics
from mutor_img.training.loop import train
from mutor_img.training.optimizer import learning_rate
from mutor_img.training.runtime import Runtime
from mutor_img.training.task import Task

ROOT = Path(__file__).parents[2]


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


def losses(run_dir) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(run_dir)) if "loss" in row]


def test_the_first_loss_is_the_log_of_the_vocabulary(run_training):
    trainer = run_training("train.steps=1")
    row = read_metrics(trainer.run_dir)[0]
    assert all(abs(row[name] - math.log(16)) < 1e-5 for name in ("loss", "next_token", "register"))


@pytest.mark.parametrize("extra", [(), ("train.ema=0.9", "model.dropout=0.2", "registers.count=null")])
def test_n_updates_equal_k_updates_and_a_resume_to_the_byte(run_training, tmp_path, extra):
    whole = run_training(f"run_dir={tmp_path}/whole", "train.steps=5", *extra)
    run_training(f"run_dir={tmp_path}/parts", "train.steps=2", *extra)
    parts = run_training(f"run_dir={tmp_path}/parts", "train.steps=5", *extra)
    assert digest(find_checkpoint(whole.run_dir)) == digest(find_checkpoint(parts.run_dir))
    assert losses(whole.run_dir) == losses(parts.run_dir)


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


def test_a_loss_that_is_not_finite_moves_no_weight_and_names_the_step(run_training, monkeypatch, tmp_path):
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
    decay, average = 0.5, None
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
    task = run_training("model.class_dropout=0.5").task
    _, labels, codes = task.batch(0, torch.arange(400))
    images, _ = task.data.order.items(torch.arange(400).numpy())
    plain = torch.from_numpy(task.codes.codes[images, 0].astype("int64"))
    mirrored = (codes != plain).any(1).float().mean()
    assert 0.4 < mirrored < 0.6 and 0.4 < (labels == 3).float().mean() < 0.6


@pytest.mark.parametrize("schedule, at", [
    ("constant", {0: 0.25, 3: 1.0, 50: 1.0, 99: 1.0}),
    ("cosine", {0: 0.25, 3: 1.0, 99: 0.1}),
    ("wsd", {0: 0.25, 3: 1.0, 79: 1.0, 90: 0.55}),
])
def test_learning_rate_schedules_at_chosen_steps(schedule, at):
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=3, decay_steps=20, final_lr=0.1)
    for step, expected in at.items():
        assert learning_rate(config, step, 100) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_a_learning_rate_below_the_last_one_stays(schedule):
    config = OptimConfig(lr=0.05, schedule=schedule, decay_steps=20, final_lr=0.1)
    assert {learning_rate(config, step, 100) for step in (0, 50, 90, 99)} == {0.05}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_a_restart_begins_the_whole_schedule_anew(schedule):
    """Each part of 30, 50 and 20 updates has the rates of a run of that length of its own."""
    one = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=3, decay_share=0.2, final_lr=0.1)
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


def test_a_task_that_lacks_a_loss_says_which():
    with pytest.raises(NotImplementedError, match="Task"):
        Task().loss(None, 0, None)


def python(*arguments, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, **kwargs)


def test_sigterm_saves_and_the_same_command_goes_on(run_file, tmp_path):
    words = [sys.executable, "train.py", "--config", str(run_file), "train.steps=100000", "train.checkpoint_every=0"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
        while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None and time.sleep(0.1) is None
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "run the same command again" in out, err
    assert read_meta(find_checkpoint(tmp_path / "runs" / "run"))["step"] >= 3


def signal_in(monkeypatch, owner, name, call, number=signal.SIGTERM) -> None:
    """Have the ``call``-th call of a function begin with a signal to this process."""
    good, calls = getattr(owner, name), []

    def interrupted(*arguments, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return good(*arguments, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("owner, name, call, step", [
    (GeneratorTask, "loss", 3, 2),  # an update's gradients are not waited for
    (GeneratorTask, "after_update", 3, 3),  # but once weights move, the update is
    (GeneratorTask, "validate", 2, 2),
    (tensor_files, "save_file", 2, 1),  # a save is finished
])
def test_a_signal_at_any_moment_loses_nothing(run_training, tmp_path, monkeypatch, owner, name, call, step):
    every = 1 if name == "save_file" else 0
    overrides = ("train.steps=4", "train.validate_every=1", f"train.checkpoint_every={every}", "train.ema=0.9")
    with monkeypatch.context() as patch:
        signal_in(patch, owner, name, call, signal.SIGINT if call == 3 else signal.SIGTERM)
        stopped = run_training(f"run_dir={tmp_path}/stopped", *overrides)
    assert stopped.step == step == read_meta(find_checkpoint(stopped.run_dir))["step"]
    again = run_training(f"run_dir={tmp_path}/stopped", *overrides)
    whole = run_training(f"run_dir={tmp_path}/whole", *overrides)
    assert digest(find_checkpoint(again.run_dir)) == digest(find_checkpoint(whole.run_dir))
    assert held_out(again.run_dir) == held_out(whole.run_dir) and len(held_out(whole.run_dir)) == 4


def held_out(run_dir) -> list[tuple[int, float]]:
    return [(row["step"], row["val_next_token"]) for row in read_metrics(Path(run_dir)) if "val_next_token" in row]


class Killed(BaseException):
    """Stands for a kill: the run does nothing more."""


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("name", ["validate", "draw_pictures"])
def test_a_kill_after_a_checkpoint_loses_no_validation_and_no_picture_of_its_step(run_training, tmp_path, monkeypatch,
                                                                                capsys, name, step):
    overrides, drawn = ("train.steps=4", "train.validate_every=1", "train.picture_every=1"), []
    monkeypatch.setattr(GeneratorTask, "draw_pictures", lambda task, model, folder, step: drawn.append(step))
    with monkeypatch.context() as patch:
        good, calls = getattr(GeneratorTask, name), []

        def deadly(*arguments):
            calls.append(1)
            if len(calls) == step:
                raise Killed
            return good(*arguments)

        patch.setattr(GeneratorTask, name, deadly)
        with pytest.raises(Killed):
            run_training(*overrides)
    run_dir = run_training(*overrides).run_dir
    whole = run_training(f"run_dir={tmp_path}/whole", *overrides)
    assert held_out(run_dir) == held_out(whole.run_dir) and len(held_out(run_dir)) == 4
    assert drawn == [*[s for s in (1, 2, 3, 4) if s < step], *range(step, 5), 1, 2, 3, 4]
    assert not list(run_dir.glob(".*"))
    run_training(*overrides)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("owner, name", [(generator, "Transformer"), (GeneratorTask, "loss")])
def test_a_signal_before_there_is_anything_to_save_ends_at_once(run_file, tiny, monkeypatch, capsys, tmp_path, owner,
                                                               name):
    signal_in(monkeypatch, owner, name, 1)
    monkeypatch.setattr(command, "end_now", lambda: print("ended"))
    command.run_task(GeneratorTask, load_config(GeneratorConfig, run_file))
    assert capsys.readouterr().out.endswith("run the same command again\nended\n")
    assert newest_checkpoint(tmp_path / "runs" / "run") is None


def half_written(tensors, path, **kwargs):
    save_file(tensors, path, **kwargs)
    os.truncate(path, path.stat().st_size // 2)
    die()


def half_removed(folder, **kwargs):
    next(Path(folder).glob("*.safetensors")).unlink()
    die()


def die(*arguments, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


# where a kill comes: a function, which of its calls, and what is done in its place
KILLS = {
    "between two files": (tensor_files, "save_file", 6, die),
    "in the midst of a file": (tensor_files, "save_file", 6, half_written),
    "before the folder appears": (os, "rename", 4, die),
    "before it is named as the latest": (checkpoint, "write_atomic", 3, die),
    "while an older one is removed": (files.shutil, "rmtree", 2, half_removed),
    "in an update": (GeneratorTask, "after_update", 3, die),
}
KILLED = ("train.steps=100", "train.keep=1")


def killed_run(run_file, run_dir, where) -> None:
    """Train until the moment comes; run in a process of its own."""
    owner, name, call, act = KILLS[where]
    good, calls = getattr(owner, name), []

    def deadly(*arguments, **kwargs):
        calls.append(1)
        return (act if len(calls) == call else good)(*arguments, **kwargs)

    blocks.PRESETS["mnist"] = (2, 2, 16)
    setattr(owner, name, deadly)
    torch.set_num_threads(1)
    config = load_config(GeneratorConfig, run_file, [f"run_dir={run_dir}", *KILLED])
    runtime = Runtime.start()
    train(GeneratorTask(config, runtime), config, runtime)


def test_a_kill_at_any_moment_loses_at_most_the_steps_since_the_last_checkpoint(run_file, run_training, tmp_path,
                                                                                processes):
    for where in KILLS:
        run_dir = tmp_path / where.replace(" ", "_")
        process = processes.Process(target=killed_run, args=(run_file, run_dir, where))
        process.start()
        process.join(200)
        assert process.exitcode == -signal.SIGKILL, where
        folder = find_checkpoint(run_dir)
        assert read_meta(folder)["step"] >= 2 and read_tensors(folder, "optimizer"), where
        again = run_training(f"run_dir={run_dir}", "train.steps=4", "train.keep=1")
        assert [p.name for p in (run_dir / "checkpoints").iterdir() if p.is_dir()] == ["step_00000004"], where
    whole = run_training(f"run_dir={tmp_path}/whole", "train.steps=4")
    assert digest(find_checkpoint(again.run_dir)) == digest(find_checkpoint(whole.run_dir))


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
    done = python("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29572", "train.py",
                  "--config", run_file, "train.global_batch=3")
    line = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    assert len(line) == 1 and "not divisible by 2 processes" in line[0] and "use 2 or 4" in line[0]


def test_a_users_mistake_is_one_line_and_status_2(run_file):
    done = python("train.py", "--config", run_file, "optim.lrr=1")
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0
    assert "did you mean 'optim.lr'" in done.stderr


def test_a_dry_run_prints_the_config_and_a_plan_and_writes_nothing(run_file, tmp_path):
    done = python("train.py", "--config", run_file, "--dry-run", "data.codes=nowhere")
    assert done.returncode == 0 and "global_batch: 4" in done.stdout and "FLOPs per update" in done.stdout
    assert not (tmp_path / "runs").exists()


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
