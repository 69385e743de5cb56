"""Every command owns what it writes before it reads anything; a second one on one output ends, and says whose it is."""

import importlib
import json
import os
import signal
import time
from pathlib import Path

import pytest

from mutor_img import blocks
from mutor_img.checkpoints.folder import find_checkpoint, read_meta
from mutor_img.common import cli, locks
from mutor_img.common.files import read_metrics
from mutor_img.common.locks import claim, file_lock, folder_lock
from mutor_img.pretraining.command import main as train

# module, its arguments (nothing that they name need be there), and the lock of what it writes
COMMANDS = [
    ("mutor_img.pretraining.command", "--config {run} run_dir={out}", folder_lock),
    ("tokenizer.train", "--config {root}/configs/mnist/tokenizer.yaml run_dir={out}", folder_lock),
    ("mutor_img.study.__main__", "--config {root}/configs/mnist/study.yaml run_dir={out}", folder_lock),
    ("mutor_img.study.__main__", "--config {root}/configs/imagenet256/study.yaml run_dir={out}", folder_lock),
    ("mutor_img.metrics.digits", "--images a --val b --out {out}", folder_lock),
    ("tokenizer.encode", "--tokenizer a --images b --out {out}", folder_lock),
    ("tokenizer.import_codes", "--format randar --source a --tokenizer b --classes c --out {out}", folder_lock),
    ("mutor_img.sweep.__main__", "--checkpoint a --reference b --out {out}", folder_lock),
    ("mutor_img.sampling.command", "--checkpoint a --out {out}.npz", lambda out: file_lock(f"{out}.npz")),
    ("mutor_img.sampling.command", "--checkpoint a --out {out}/", file_lock),
    ("mutor_img.sampling.command", "--checkpoint a --grid {out}.png", lambda out: file_lock(f"{out}.png")),
    ("mutor_img.sampling.command", "--checkpoint a --show-steps {out}.png", lambda out: file_lock(f"{out}.png")),
    ("mutor_img.evaluation.command", "--samples a --reference b --json {out}", file_lock),
    ("mutor_img.evaluation.command", "--make-reference a --role generation --out {out}", file_lock),
    ("mutor_img.convert", "--source a --out {out}", file_lock),
    ("tokenizer.reconstruct", "--tokenizer a --images b --out {out}.png", lambda out: file_lock(f"{out}.png")),
    ("tokenizer.reconstruct", "--tokenizer a --images b --json {out}", file_lock),
    ("tokenizer.reconstruct", "--tokenizer a --images b --samples {out}", file_lock),
    ("tokenizer.inspect", "--codes a --out {out}.png", lambda out: file_lock(f"{out}.png")),
    ("benchmarks.tokenizer_sharpness", "--out {out}.png", lambda out: file_lock(f"{out}.png")),
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("module, arguments, lock", COMMANDS)
def test_a_second_command_on_one_output_ends_with_status_2_and_names_the_first(
        run_file, tmp_path, monkeypatch, capsys, module, arguments, lock):
    main = importlib.import_module(module).main
    words = arguments.format(run=run_file, root=ROOT, out=tmp_path / "out").split()
    with claim(lock(tmp_path / "out")), monkeypatch.context() as patch:
        patch.delenv(locks._HELD)  # the second is no command of the first
        patch.setattr(locks.SoftFileLease, "is_lock_held_by_us", False)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            cli.run(main, words)
        assert sorted(tmp_path.rglob("*")) == before
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and error.startswith("error: ") and "\n" not in error
    assert f"process {os.getpid()} on host {os.uname().nodename.partition('?')[0]} is writing there" in error
    assert not list(tmp_path.rglob("*.lock"))


KEEPS = {"--checkpoint a --out {out}.npz", "--checkpoint a --out {out}/",  # what is there may be these samples
         "--tokenizer a --images b --samples {out}"}  # it says so itself, once it has read its tokenizer


def output_of(arguments: str, out: Path) -> Path:
    """Return what a command of the list writes."""
    return Path(next(word for word in arguments.split() if "{out}" in word).format(out=out).removeprefix("run_dir="))


@pytest.mark.parametrize("place", ["/proc/out", "/proc/a/out", "{tmp}/file/out", "{tmp}/file/a/out"])
@pytest.mark.parametrize("module, arguments, lock", [
    *COMMANDS, ("mutor_img.gpu_report.__main__", "--out {out}.md", None)])
def test_an_output_that_cannot_be_written_is_one_line_before_any_work(
        run_file, tmp_path, monkeypatch, capsys, module, arguments, lock, place):
    monkeypatch.setattr("torch.cuda.is_available", lambda: "gpu_report" in module)
    (tmp_path / "file").touch()
    out = place.format(tmp=tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.run(importlib.import_module(module).main, arguments.format(run=run_file, root=ROOT, out=out).split())
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in error
    assert error.startswith(f"error: {output_of(arguments, out)}: cannot be written")


@pytest.mark.parametrize("module, arguments, lock", [
    *(command for command in COMMANDS if command[2] is not folder_lock and command[1] not in KEEPS),
    ("mutor_img.gpu_report.__main__", "--out {out}.md", None)])
def test_an_output_file_that_is_a_folder_is_one_line_before_any_work(
        tmp_path, monkeypatch, capsys, module, arguments, lock):
    monkeypatch.setattr("torch.cuda.is_available", lambda: "gpu_report" in module)
    output_of(arguments, tmp_path / "out").mkdir()
    with pytest.raises(SystemExit) as stopped:
        cli.run(importlib.import_module(module).main, arguments.format(out=tmp_path / "out").split())
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in error
    assert error.startswith(f"error: {output_of(arguments, tmp_path / 'out')}")


def in_process(words) -> None:
    """Run ``train.py`` as the program does."""
    blocks.PRESETS["mnist"] = (2, 2, 16)
    cli.run(train, words)


def test_a_run_has_one_process_and_a_killed_one_goes_on_at_once(run_file, tiny, processes, tmp_path, capsys):
    words = ["--config", str(run_file), "train.steps=100000"]
    run_dir = tmp_path / "runs" / "run"

    def started():
        steps = len(read_metrics(run_dir))
        process = processes.Process(target=in_process, args=(words,))
        process.start()
        while len(read_metrics(run_dir)) < steps + 3:
            assert process.is_alive() and time.sleep(0.1) is None
        return process

    first = started()
    with pytest.raises(SystemExit) as stopped:
        cli.run(train, words)
    assert stopped.value.code == 2 and f"process {first.pid} on host " in capsys.readouterr().err
    assert first.is_alive()
    first.kill()
    first.join()
    assert (run_dir / ".lock").is_file()
    second = started()  # the same command
    os.kill(second.pid, signal.SIGTERM)
    second.join(60)
    assert second.exitcode == 0 and not (run_dir / ".lock").exists()
    step = read_meta(find_checkpoint(run_dir))["step"]
    cli.run(train, [*words[:2], f"train.steps={step}"])
    assert "nothing to do" in capsys.readouterr().out and not list(tmp_path.rglob("*.lock"))
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step
