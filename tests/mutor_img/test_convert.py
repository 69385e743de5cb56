"""Weights go from LlamaGen's files to checkpoints and back without a change, and training starts from them."""

import errno

import pytest
import torch

from mutor_img import convert as module
from mutor_img import load_checkpoint
from mutor_img.checkpoints.folder import write_checkpoint
from mutor_img.checkpoints.llamagen import read_pt
from mutor_img.common import cli
from mutor_img.common.errors import UserError
from mutor_img.convert import main
from tokenizer import load_tokenizer
from tokenizer.network.vq import VQModel, preset


@pytest.fixture
def released(tmp_path, random_model):
    """A file as LlamaGen would release it: names of its own, and an old rotary table among the weights."""
    model = random_model(dim=128, heads=2, register_offsets=None)
    path = tmp_path / "c2i.pt"
    torch.save({"model": {**model.state_dict(), "freqs_cis": torch.zeros(3)}}, path)
    return path, model


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_generator_goes_there_and_back_without_a_change(released, tmp_path, capsys):
    path, model = released
    main(["--source", str(path), "--out", str(tmp_path / "run"), "--grid", "4x5"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(model.state_dict()) + 1 and "generator" in lines[-1]
    main(["--source", str(tmp_path / "run"), "--out", str(tmp_path / "back.pt")])
    assert equal(read_pt(tmp_path / "back.pt"), model.state_dict())
    ours = load_checkpoint(tmp_path / "run")
    labels, codes = torch.tensor([0, 2]), torch.randint(11, (2, 19))
    assert torch.equal(ours(labels, codes), model(labels, codes))


def test_a_grid_survives_the_trip_and_a_guess_is_said(random_model, tmp_path, capsys):
    model = random_model((6, 6), dim=32, heads=2, register_offsets=None)
    torch.save({"model": model.state_dict()}, tmp_path / "silent.pt")
    main(["--source", str(tmp_path / "silent.pt"), "--out", str(tmp_path / "guess")])
    assert "does not say its grid of codes: 16 x 16 is assumed" in capsys.readouterr().err
    main(["--source", str(tmp_path / "silent.pt"), "--grid-size", "6", "--out", str(tmp_path / "run")])
    main(["--source", str(tmp_path / "run"), "--out", str(tmp_path / "back.pt")])
    assert load_checkpoint(tmp_path / "back.pt").config.grid == (6, 6) and not capsys.readouterr().err
    table = torch.load(tmp_path / "back.pt", weights_only=True)["model"]["freqs_cis"]
    assert table.shape == (37, 16, 2) and not table[0].any()
    with pytest.raises(UserError, match="for 6 x 6 codes, but a grid of 16 x 16 was asked for"):
        main(["--source", str(tmp_path / "back.pt"), "--grid-size", "16x16", "--out", str(tmp_path / "other")])


def test_a_tokenizer_goes_there_and_back_without_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenizer.loading.RELEASED", ("mnist",))
    vq = VQModel(**preset("mnist"))
    torch.save({"model": vq.state_dict()}, tmp_path / "vq.pt")
    main(["--source", str(tmp_path / "vq.pt"), "--out", str(tmp_path / "vq")])
    main(["--source", str(tmp_path / "vq"), "--out", str(tmp_path / "back.pt")])
    assert equal(read_pt(tmp_path / "back.pt"), vq.state_dict())
    assert equal(load_tokenizer(tmp_path / "vq").state_dict(), vq.state_dict())


@pytest.mark.parametrize("arguments, message", [
    (["--source", "missing.pt"], "missing.pt"),
    (["--source", "{pt}", "--grid", "4by5"], "--grid-size is '4by5'"),
    (["--source", "{pt}", "--weights", "best"], "--weights is 'best'"),
    (["--source", "{pt}", "--weights", "ema"], "EMA"),
])
def test_what_cannot_be_converted_is_one_line_and_writes_nothing(released, tmp_path, arguments, message):
    with pytest.raises(UserError) as caught:
        main([a.format(pt=released[0]) for a in arguments] + ["--out", str(tmp_path / "out")])
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_an_existing_output_is_left_alone(released, tmp_path):
    (tmp_path / "out.pt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        main(["--source", str(released[0]), "--out", str(tmp_path / "out.pt")])


def test_mutor_starts_from_weights_without_registers(run_training, tmp_path):
    plain = run_training(f"run_dir={tmp_path}/plain", "registers.kind=none")
    start = run_training(f"run_dir={tmp_path}/start", f"init_from={tmp_path}/plain", "optim.lr=1e-12")
    for name, weight in plain.model.state_dict().items():
        assert torch.allclose(start.model.state_dict()[name], weight, atol=1e-6), name
    assert start.model.register_embedding.weight.std() > 0


def test_next_token_prediction_goes_on_from_weights_with_registers(run_training, tmp_path):
    mutor = run_training(f"run_dir={tmp_path}/mutor")
    start = run_training(f"run_dir={tmp_path}/start", f"init_from={tmp_path}/mutor", "registers.kind=none",
                         "optim.lr=1e-12")
    assert "register_embedding.weight" not in start.model.state_dict()
    for name, weight in start.model.state_dict().items():
        assert torch.allclose(mutor.model.state_dict()[name], weight, atol=1e-6), name


def test_a_start_whose_file_says_another_grid_is_refused(run_training, random_model, tmp_path):
    model = random_model((4, 5), dim=16, vocabulary=16, register_offsets=None)
    torch.save({"model": {**model.state_dict(), "freqs_cis": torch.zeros(577, 4, 2)}}, tmp_path / "c2i.pt")
    with pytest.raises(UserError, match="for 24 x 24 codes, but a grid of 4 x 5 was asked for"):
        run_training(f"init_from={tmp_path}/c2i.pt")


def test_qk_norm_is_neither_started_from_weights_without_it_nor_written_in_llamagens_layout(
        run_training, random_model, tmp_path):
    model = random_model((4, 5), dim=16, vocabulary=16, register_offsets=None)
    torch.save({"model": model.state_dict()}, tmp_path / "c2i.pt")
    with pytest.raises(UserError, match=r"c2i\.pt: was trained without QK-norm, but model\.qk_norm is true; give "
                                        r"model\.qk_norm=false"):
        run_training(f"init_from={tmp_path}/c2i.pt", "model.qk_norm=true")
    run = run_training("model.qk_norm=true", "train.steps=1").run_dir
    with pytest.raises(UserError, match=r"has QK-norm .* give an --out that does not end in \.pt"):
        main(["--source", str(run), "--out", str(tmp_path / "back.pt")])
    main(["--source", str(run), "--out", str(tmp_path / "copy")])
    assert load_checkpoint(tmp_path / "copy").config.qk_norm and not (tmp_path / "back.pt").exists()


def test_offsets_that_a_pt_could_not_say_are_not_written_as_one(run_training, tmp_path):
    run = run_training("train.steps=1", "registers.kind=set", "registers.offsets=[3,5]",
                       "registers.embedding=per_offset").run_dir
    with pytest.raises(UserError, match=r"registers at offsets \[3, 5\], which .* an --out that does not end in \.pt"):
        main(["--source", str(run), "--out", str(tmp_path / "back.pt")])
    assert not (tmp_path / "back.pt").exists()


@pytest.mark.parametrize("heads, grid", [(1, (4, 4)), (2, (4, 4)), (4, (4, 4)), (2, (4, 5))])
def test_heads_and_a_grid_that_a_pt_does_not_say_are_noted(heads, grid, random_model, tmp_path, capsys):
    model = random_model(grid, dim=128, heads=heads)
    write_checkpoint(tmp_path / "run", 1, {"model": model.state_dict()},
                     {"kind": "generator", "model": model.config.to_json()}, 1)
    main(["--source", str(tmp_path / "run"), "--out", str(tmp_path / "back.pt")])
    noted = capsys.readouterr().err
    assert (f"heads={heads}" in noted) == (heads != 2) and ("--grid-size 4x5" in noted) == (grid != (4, 4))
    assert load_checkpoint(tmp_path / "back.pt", heads=heads, grid=grid).config == model.config


def test_a_full_disk_leaves_nothing_in_the_way(released, tmp_path, monkeypatch):
    def full(folder, *others, **named):
        (folder / "checkpoints").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    words = ["--source", str(released[0]), "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_checkpoint", full)
        with pytest.raises(OSError):
            main(words)
    assert not (tmp_path / "run").exists()
    main(words)
    assert load_checkpoint(tmp_path / "run").config.layers


def test_weights_of_another_model_are_no_start(run_training, tmp_path):
    run_training(f"run_dir={tmp_path}/plain", "model.preset=B")
    with pytest.raises(UserError, match="weight"):
        run_training(f"run_dir={tmp_path}/start", f"init_from={tmp_path}/plain")


@pytest.mark.parametrize("name", ["file/back.pt", "file/run"])
def test_a_path_below_a_file_is_one_line(released, tmp_path, name, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        cli.run(main, ["--source", str(released[0]), "--grid", "4x5", "--out", str(tmp_path / name)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and f"error: {tmp_path / 'file'}" in error
