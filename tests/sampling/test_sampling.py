"""sample.py's flags: what each changes, whose weights and tokenizer it takes, and mistakes in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import start_sampling
from tiny_runs import sample, write_generator, write_tokenizer

from mutor_img.checkpoints.folder import write_checkpoint
from mutor_img.common.errors import UserError
from mutor_img.decoding.sampler import generate
from mutor_img.sampling import main
from tokenizer import load_tokenizer
from tokenizer.inspect import main as inspect


@pytest.mark.parametrize("flags", [
    ["--seed", "1"], ["--cfg-scale", "6"], ["--temperature", "0.3"], ["--top-k", "1"], ["--top-p", "0.2"],
    ["--labels", "balanced"], ["--classes", "1"], ["--dtype", "bf16"], ["--cfg-schedule", "linear"],
    ["--cfg-schedule", "power-cosine", "--cfg-parameter", "2"], ["--cfg-schedule", "interval", "--cfg-parameter", "1"],
], ids=" ".join)
def test_every_flag_that_decides_samples_changes_them(run_of, tmp_path, flags):
    run = run_of()
    plain, changed = sample(run, tmp_path / "a.npz", count=20), sample(run, tmp_path / "b.npz", *flags, count=20)
    assert plain.read_bytes() != changed.read_bytes()


def test_a_run_is_sampled_from_any_folder_and_where_its_project_was_moved_to(random_model, make_codes, tmp_path,
                                                                              monkeypatch):
    for name in ("project", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "project")
    vq = write_tokenizer(Path("runs/tokenizer"), vocabulary=16)
    make_codes(Path("codes"), vq=vq)
    run = write_generator(Path("runs/run"), random_model((4, 4), vocabulary=16), vq)
    here = sample(run, tmp_path / "here.npz", count=2)
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "project").rename(tmp_path / "moved")
    write_tokenizer(Path("runs/tokenizer"), seed=1, vocabulary=16)  # another project's, of the same name
    there = sample(str(tmp_path / "moved" / "runs" / "run"), tmp_path / "there.npz", count=2)
    assert there.read_bytes() == here.read_bytes()
    inspect(["--codes", str(tmp_path / "moved" / "codes"), "--out", "codes.png"])
    shutil.rmtree(tmp_path / "moved" / "runs" / "tokenizer")
    with pytest.raises(UserError, match="runs/tokenizer: its weights have sha256"):
        sample(str(tmp_path / "moved" / "runs" / "run"), tmp_path / "again.npz", count=2)
    shutil.rmtree("runs")
    with pytest.raises(UserError, match="runs/tokenizer: no such file or folder"):
        sample(str(tmp_path / "moved" / "runs" / "run"), tmp_path / "again.npz", count=2)


def test_weights_and_tokenizer_can_be_chosen(run_of, random_model, tmp_path, capsys):
    run = run_of()
    model = random_model((4, 4))
    meta = json.loads(next(Path(run).glob("checkpoints/*/checkpoint.json")).read_text())
    write_checkpoint(run, 9, {"model": model.state_dict(), "ema": random_model((4, 4), seed=1).state_dict()},
                     {key: meta[key] for key in ("kind", "model", "codes")}, 1)
    auto, ema, raw = (sample(run, tmp_path / f"{w}.npz", "--weights", w, count=9).read_bytes()
                      for w in ("auto", "ema", "raw"))
    assert auto == ema != raw
    write_tokenizer(tmp_path / "other", seed=1)
    other = sample(run, tmp_path / "other.npz", "--tokenizer", str(tmp_path / "other"), count=9).read_bytes()
    assert other != auto and "warning:" in capsys.readouterr().err


def test_a_released_file_needs_its_tokenizer_named(random_model, tmp_path):
    model = random_model((16, 16), heads=1, register_offsets=None)
    torch.save({"model": model.state_dict()}, tmp_path / "c2i.pt")
    with pytest.raises(UserError, match="does not name its tokenizer; give --tokenizer"):
        sample(str(tmp_path / "c2i.pt"), tmp_path / "s.npz", count=2)
    write_tokenizer(tmp_path / "vq", image_channels=3)
    out = sample(str(tmp_path / "c2i.pt"), tmp_path / "s.npz", "--tokenizer", str(tmp_path / "vq"), count=2)
    assert np.load(out)["arr_0"].shape == (2, 32, 32, 3)


@pytest.fixture
def released(random_model, tmp_path):
    """A function (table) -> a file of weights in LlamaGen's layout, with or without a rotary table, and a tokenizer."""
    write_tokenizer(tmp_path / "vq", image_channels=3)  # 2 x 2 pixels per code

    def save(rows=None):
        weights = random_model((6, 6), heads=1, register_offsets=None).state_dict()
        table = {} if rows is None else {"freqs_cis": torch.zeros(rows, 16, 2)}
        torch.save({"model": {**weights, **table}}, tmp_path / "c2i.pt")
        return str(tmp_path / "c2i.pt"), "--tokenizer", str(tmp_path / "vq")

    return save


def test_a_files_own_grid_is_sampled_and_a_guess_is_said(released, tmp_path, capsys):
    run, *flags = released(37)
    assert np.load(sample(run, tmp_path / "own.npz", *flags, count=2))["arr_0"].shape == (2, 12, 12, 3)
    assert "grid" not in capsys.readouterr().err
    assert json.loads((tmp_path / "own.json").read_text())["grid"] == [6, 6]
    with pytest.raises(UserError, match="is for 6 x 6 codes, but a grid of 4 x 4 was asked for"):
        sample(run, tmp_path / "s.npz", *flags, "--grid-size", "4x4", count=2)
    run, *flags = released()
    assert np.load(sample(run, tmp_path / "guess.npz", *flags, count=2))["arr_0"].shape == (2, 32, 32, 3)
    assert "c2i.pt does not say its grid of codes: 16 x 16 is assumed" in capsys.readouterr().err
    for text, shape in (("6", (2, 12, 12, 3)), ("6x4", (2, 12, 8, 3))):
        out = sample(run, tmp_path / f"{text}.npz", *flags, "--grid-size", text, count=2)
        assert np.load(out)["arr_0"].shape == shape and "assumed" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"was made with grid \[6, 6\], now it is \[6, 4\]"):
        sample(run, tmp_path / "6.npz", *flags, "--grid-size", "6x4", count=2)


def test_images_are_shrunk_before_they_are_rounded(run_of, random_model, tmp_path):
    run = run_of()
    out = sample(run, tmp_path / "s.npz", "--resize", "6", count=70)
    codes = generate(random_model((4, 4)), torch.from_numpy(np.load(out)["arr_1"]), seed=0)
    pixels = load_tokenizer(tmp_path / "tokenizer").decode(codes)  # (70, 1, 8, 8)
    small = torch.nn.functional.interpolate(pixels, size=(6, 6), mode="bicubic")
    expected = torch.clamp(127.5 * small + 128.0, 0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.load(out)["arr_0"], expected.repeat(3, -1))
    manifest = json.loads((tmp_path / "s.json").read_text())
    assert manifest["resize"] == 6 and manifest["resize_rule"].startswith("bicubic")
    again = sample(run, tmp_path / "b.npz", "--resize", "6", "--batch-size", "3", count=70)
    assert again.read_bytes() == out.read_bytes()
    plain = sample(run, tmp_path / "plain.npz", count=70)
    assert sample(run, tmp_path / "same.npz", "--resize", "8", count=70).read_bytes() == plain.read_bytes()
    with pytest.raises(UserError, match="made with resize 6, now it is 5"):
        sample(run, out, "--resize", "5", count=70)


@pytest.mark.parametrize(("flags", "words"), [
    ([], "nothing to write; give --out"), (["--out", "s.npz", "--grid-size", "16by16"], "--grid-size is '16by16'"),
    (["--out", "s.npz", "--grid-size", "8x8"], "grid (8, 8) was asked for, but the run has (4, 4)"),
    (["--out", "s.npz", "--grid-size", "0"], "--grid-size is '0'"),
    (["--out", "s.npz", "--resize", "0"], "--resize is 0"),
    (["--out", "s.npz", "--resize", "9"], "--resize 9: the images are 8 pixels per side"),
    (["--grid", "g.png", "--resize", "4"], "--resize does nothing without --out"),
    (["--out", "s.zip"], "s.zip: must end in .npz, or in / for a folder"),
    (["--out", "./"], "./: has no name of its own"), (["--grid", "g.jpg"], "must end in .png"),
    (["--show-steps", "s.gif"], "s.gif: must end in .png"),
    (["--grid", "g.png", "--labels", "random"], "--labels does nothing for --grid"),
    (["--show-steps", "s.png", "--num-samples", "5"], "--num-samples does nothing for --show-steps"),
    (["--show-steps", "s.png", "--batch-size", "5"], "--batch-size does nothing for --show-steps"),
    (["--out", "s.npz", "--cfg", "2"], "did you mean '--cfg-scale'"),
    (["--out", "s.npz", "--cfg-scale", "x"], "invalid float value"), (["--out", "s.npz", "--cfg-scale", "0"], "cfg_"),
    (["--out", "s.npz", "--num-samples", "0"], "--num-samples is 0"), (["--out", "s.npz", "--top-k", "99"], "top_k"),
    (["--out", "s.npz", "--batch-size", "0"], "--batch-size is 0"), (["--out", "s.npz", "--labels", "rnd"], "--labels"),
    (["--out", "s.npz", "--weights", "avg"], "--weights"), (["--out", "s.npz", "--weights", "ema"], "no EMA weights"),
    (["--out", "s.npz", "--classes", "dgo"], "did you mean 'dog'"), (["--out", "s.npz", "--dtype", "fp8"], "--dtype"),
    (["--out", "s.npz", "--device", "tpu"], "--device"),
    (["--out", "s.npz", "--device", "cuda:99"], "--device cuda:99: there is no such device here"),
    (["--out", "s.npz", "--tokenizer", "absent"], "absent"),
    (["--out", "s.npz", "--cfg-schedule", "interval"], "needs cfg-parameter"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_mistake_is_one_clear_line(run_of, tmp_path, monkeypatch, flags, words):
    run = run_of()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        main(["--checkpoint", run, *flags])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("s.*"))


@pytest.mark.parametrize(("codes", "words"), [
    ({"tokenizer_hash": "0" * 64}, "were made by a tokenizer with 0000000000000000"),
    ({"tokenizer": "/absent/vq"}, "/absent/vq: no such file or folder"), ({"tokenizer": None}, "give --tokenizer"),
    ({"image_size": 16}, "codes of 16 pixels"), ({"image_size": 0}, "step_00000003: image size 0 does not fit"),
], ids=str)
def test_a_tokenizer_that_does_not_fit_is_refused(run_of, tmp_path, codes, words):
    with pytest.raises(UserError, match=words):
        sample(run_of(**codes), tmp_path / "s.npz")


def test_a_tokenizer_of_another_vocabulary_is_refused(run_of, tmp_path):
    write_tokenizer(tmp_path / "large", vocabulary=12)
    with pytest.raises(UserError, match=r"has 12 codes, but .* makes 11"):
        sample(run_of(), tmp_path / "s.npz", "--tokenizer", str(tmp_path / "large"))


def test_the_command_exits_2_with_one_line_for_a_mistake(tmp_path):
    process = start_sampling("--checkpoint", tmp_path / "absent", "--out", "s.npz", cwd=tmp_path)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2 and errors.startswith("error: ") and len(errors.splitlines()) == 1
