"""Signals and kills at any moment of a run: it saves where it can, and the same command loses as little as it must."""

import os
import signal
from pathlib import Path

import pytest
import torch
from launching import digest
from safetensors.torch import save_file

from mutor_img import blocks
from mutor_img.checkpoints import folder as checkpoint
from mutor_img.checkpoints import tensor_files
from mutor_img.checkpoints.folder import find_checkpoint, newest_checkpoint, read_meta, read_tensors
from mutor_img.common import files
from mutor_img.common.config import load_config
from mutor_img.common.files import read_metrics
from mutor_img.pretraining import task as generator
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training import command
from mutor_img.training.loop import train
from mutor_img.training.runtime import Runtime


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
    monkeypatch.setattr(command, "end_now", lambda status: print("ended", status))
    command.run_task(GeneratorTask, load_config(GeneratorConfig, run_file))
    assert capsys.readouterr().out.endswith("run the same command again\nended 0\n")
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
