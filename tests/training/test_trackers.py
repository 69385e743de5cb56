"""Trackers: which a run writes to, and one run of Weights & Biases for all sittings of a run."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny_runs import write_tokenizer

from mutor_img.checkpoints.folder import newest_checkpoint
from mutor_img.common import cli
from mutor_img.common.errors import UserError
from mutor_img.common.files import read_json, read_metrics
from mutor_img.pretraining.command import main as train_generator
from mutor_img.training import log
from mutor_img.training.trackers import open_wandb
from tokenizer.train import main as train_tokenizer

BOTH = "train.trackers=[tensorboard,wandb]"


class Recorder:
    """Stands for an Accelerate tracker."""

    def __init__(self):
        self.values, self.pictures, self.finished = [], [], 0

    def log(self, values, step):
        self.values.append({"step": step, **values})

    def log_images(self, values, step):
        self.pictures += [(step, name, image.size) for name, images in values.items() for image in images]

    def finish(self):
        self.finished += 1


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(log, "open_wandb", lambda config: recorder)
    return recorder


def finished(path):
    """Return all records of a ``.wandb`` file, once its writer, another process, has written the last one."""
    for _ in range(200):
        found = list(records(path))
        if found and found[-1].HasField("exit"):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def records(path):
    """Yield the records of a ``.wandb`` file: after 7 bytes a LevelDB log, whose blocks of 32 KiB hold protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    while place < len(data):
        if 32768 - place % 32768 < 7:  # no room for a head
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4:place + 6], "little"), data[place + 6]
        whole += data[place + 7:place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # full, or the last part
            yield Record.FromString(whole)
            whole = b""


def items(entries):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in entries}


@pytest.mark.parametrize("overrides, events, wandb", [((), True, False), (("train.trackers=[]",), False, False),
                                                      (("train.trackers=[wandb]",), False, True)])
def test_a_run_writes_to_the_trackers_that_are_named_and_always_to_its_own_file(run_training, recorder, overrides,
                                                                                events, wandb):
    trainer = run_training("train.validate_every=3", *overrides)
    assert (trainer.run_dir / "tensorboard").exists() == events
    rows = read_metrics(trainer.run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 3] and "val_next_token" in rows[-1]
    assert recorder.values == (rows if wandb else []) and recorder.finished == wandb


def test_the_grids_of_a_run_are_given_to_the_tracker(run_training, make_codes, recorder, tmp_path):
    vq = write_tokenizer(tmp_path / "vq", vocabulary=16)
    make_codes(tmp_path / "square", vq=vq)
    trainer = run_training(f"data.codes={tmp_path}/square", "data.val_codes=null", "model.grid=[4,4]", BOTH,
                           "train.picture_every=2", "pictures.per_class=1")
    drawn = sorted((trainer.run_dir / "pictures").glob("*.png"))
    assert recorder.pictures == [(step, "samples", Image.open(path).size) for step, path in zip((2, 3), drawn)]


def test_a_tokenizers_training_is_tracked_alike(recorder, digit_folders, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"""
run_dir: {tmp_path / "run"}
data: {{images: {digit_folders["val"]}, image_size: 32, workers: 1}}
model: {{preset: mnist, channels: 8, vocabulary: 32, code_dim: 4}}
train: {{steps: 2, global_batch: 4, precision: fp32, compile: false, log_every: 1, picture_every: 2, trackers: [wandb]}}
""")
    train_tokenizer(["--config", str(path)])
    assert [row["step"] for row in recorder.values] == [1, 2] and recorder.finished == 1
    assert [picture[:2] for picture in recorder.pictures] == [(2, "reconstructions")]


def test_all_sittings_of_a_run_are_one_run_of_wandb_with_pictures_and_scores_in_its_summary(
        run_training, make_codes, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "digits")
    make_codes(tmp_path / "square", vq=write_tokenizer(tmp_path / "vq", vocabulary=16))
    shared = (f"data.codes={tmp_path}/square", f"data.val_codes={tmp_path}/square", "model.grid=[4,4]", BOTH,
              "train.picture_every=3", "train.validate_every=3", "pictures.per_class=1")
    run_training(*shared, "train.steps=2")
    run = run_training(*shared).run_dir
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))  # by their time
    name = read_json(run / "trackers.json")["wandb"]
    assert [path.name for path in files] == [f"run-{name}.wandb"] * 2
    sittings = [finished(path) for path in files]
    begun = [record.run for sitting in sittings for record in sitting if record.WhichOneof("record_type") == "run"]
    assert {(one.run_id, one.project, one.display_name) for one in begun} == {(name, "digits", str(run))}
    history = [items(record.history.item) for sitting in sittings for record in sitting if record.HasField("history")]
    rows = read_metrics(run)
    assert [row["_step"] for row in history] == [1, 2, 3] and [row["loss"] for row in history] == [
        row["loss"] for row in rows if "loss" in row]
    picture = next((run / "wandb").glob("*/files/" + history[-1]["samples/filenames"][0]))
    assert picture.read_bytes()[1:4] == b"PNG" and history[-1]["val_next_token"] == rows[-1]["val_next_token"]
    summary = {}
    for record in sittings[-1]:
        summary |= items(record.summary.update)
    assert summary["val_next_token"] == rows[-1]["val_next_token"]


def test_without_the_package_or_a_login_a_run_says_so_before_its_first_update(run_training, monkeypatch, tmp_path,
                                                                              capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda argv: run_training(BOTH), [])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and "pip install 'mutor_img[wandb]'" in line
    assert newest_checkpoint(tmp_path / "runs" / "run") is None


def test_a_tracker_that_cannot_begin_is_one_line_and_the_same_command_begins_once_it_can(run_training, monkeypatch,
                                                                                         recorder, tmp_path):
    wandb = pytest.importorskip("wandb")

    def refuse(**options):
        raise wandb.errors.UsageError("No API key configured.\nmore")

    monkeypatch.setattr(log, "open_wandb", open_wandb)
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"wandb cannot start \(No API key configured\.\); run wandb login"):
        run_training(BOTH)
    assert newest_checkpoint(tmp_path / "runs" / "run") is None
    monkeypatch.setattr(log, "open_wandb", lambda config: recorder)
    train_generator(["--config", str(tmp_path / "configs" / "run.yaml"), BOTH, "train.steps=1"])
    assert [row["step"] for row in recorder.values] == [1]


@pytest.mark.parametrize("record", ["[]", '{"wandb": 5}', '{"wandb": null}'])
def test_a_record_without_an_id_is_one_line(tmp_path, record):
    pytest.importorskip("wandb")
    (tmp_path / "trackers.json").write_text(record)
    with pytest.raises(UserError, match=r"trackers\.json: (has no id|must be a JSON object).*; remove it"):
        open_wandb(SimpleNamespace(run_dir=tmp_path))


def test_a_setting_of_the_environment_that_cannot_be_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("wandb").teardown()  # it looks at the environment once per process
    monkeypatch.setenv("WANDB_MODE", "offlin")
    with pytest.raises(UserError, match=r"wandb cannot start \(.*mode Input should be 'online', 'offline'"):
        open_wandb(SimpleNamespace(run_dir=tmp_path))


def test_an_unknown_tracker_names_the_nearest(run_training):
    with pytest.raises(UserError, match=r"train.trackers is 'wanb'; did you mean 'wandb'"):
        run_training("train.trackers=[wanb]")
