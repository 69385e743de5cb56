"""--draft on the command lines: the same bytes, the setting in the manifest, and mistakes in one line."""

import json
import shutil
from pathlib import Path

import pytest

from mutor_img.app.command import main as app
from mutor_img.checkpoints.folder import write_checkpoint
from mutor_img.checkpoints.loading import load_run
from mutor_img.common.errors import UserError
from mutor_img.common.files import read_json
from mutor_img.evaluation.command import main as evaluate
from mutor_img.sampling import main
from mutor_img.sampling.archive import SampleArchive
from mutor_img.sweep.__main__ import main as sweep

DRAFTS = [("2", "window"), ("4", "registers"), ("auto", "frequency")]


def sample(run, out, *flags, count=70):
    main(["--checkpoint", run, "--out", str(out), "--num-samples", str(count), *flags])
    return out.read_bytes(), read_json(out.with_suffix(".json"))


@pytest.mark.parametrize(("window", "source"), DRAFTS)
def test_a_drafted_set_has_the_bytes_of_another_and_says_how_it_was_drafted(run_of, tmp_path, window, source):
    run = run_of()
    plain, about = sample(run, tmp_path / "plain.npz")
    drafted, says = sample(run, tmp_path / "d.npz", "--draft", window, "--draft-source", source, "--batch-size", "3")
    assert drafted == plain
    assert about == {**{key: value for key, value in says.items() if key != "draft_source"}, "draft": 0}
    assert (says["draft"], says["draft_source"]) == (window if window == "auto" else int(window), source)


def test_a_killed_run_goes_on_with_other_drafts_and_a_finished_one_is_left(run_of, tmp_path, monkeypatch, capsys):
    run, out, write = run_of(), tmp_path / "d.npz", SampleArchive.write
    plain, _ = sample(run, tmp_path / "plain.npz")

    def killed(self, unit, images):
        write(self, unit, images)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SampleArchive, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            sample(run, out, "--draft", "4")
    assert sample(run, out, "--draft", "2", "--draft-source", "frequency")[0] == plain
    assert sample(run, out)[0] == plain and "nothing to do" in capsys.readouterr().out


def test_pictures_are_the_same(run_of, tmp_path):
    run = run_of()
    for name, flags in (("a", ()), ("b", ("--draft", "8", "--draft-source", "registers"))):
        main(["--checkpoint", run, "--grid", str(tmp_path / f"{name}.png"), "--show-steps",
              str(tmp_path / f"{name}_steps.png"), "--num-samples", "1", *flags])
    for name in ("{}.png", "{}_steps.png"):
        assert (tmp_path / name.format("a")).read_bytes() == (tmp_path / name.format("b")).read_bytes()


@pytest.mark.parametrize(("flags", "words"), [
    (["--draft", "some"], "--draft is 'some'"), (["--draft", "1.5"], "--draft is '1.5'"),
    (["--draft", "2", "--draft-source", "regsters"], "did you mean 'registers'"),
    (["--draft-source", "registers"], "does nothing without drafts"),
    (["--draft", "0", "--draft-source", "window"], "does nothing without drafts"),
], ids=" ".join)
def test_every_command_refuses_a_draft_that_cannot_be_read(flags, words, tmp_path):
    nowhere = ["--checkpoint", str(tmp_path / "none")]
    for command, more in ((main, ["--out", str(tmp_path / "s.npz")]), (evaluate, ["--reference", "r.npz"]),
                          (sweep, ["--reference", "r.npz"]), (app, [])):
        with pytest.raises(UserError) as error:
            command([*nowhere, *more, *flags])
        assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_window_below_none_writes_nothing(run_of, tmp_path):
    run = run_of()
    with pytest.raises(UserError, match="draft is -1"):
        sample(run, tmp_path / "s.npz", "--draft", "-1")
    assert not list(tmp_path.glob("s.*"))


def trained(run, registers, **model):
    """Change what a run says of its registers."""
    folder = next(Path(run).glob("checkpoints/step*"))
    meta = json.loads((folder / "checkpoint.json").read_text())
    weights = load_run(run).model.state_dict()
    if model.get("register_offsets", ()) is None:
        del weights["register_embedding.weight"]
    shutil.rmtree(Path(run) / "checkpoints")
    write_checkpoint(Path(run), 3, {"model": weights}, {**{key: meta[key] for key in ("kind", "codes")},
                     "model": {**meta["model"], **model}, "config": {"registers": registers}}, 1)


def test_offsets_that_a_run_was_not_trained_on_are_named_and_change_nothing(run_of, tmp_path, capsys):
    run = run_of()
    drafted = ["--draft", "6", "--draft-source", "registers"]
    plain, _ = sample(run, tmp_path / "a.npz", *drafted)
    assert "not trained" not in capsys.readouterr().err  # nothing says what it was trained on
    trained(run, {"kind": "2d", "d_max": 2})
    assert load_run(run).trained_offsets == (1, 4, 5)
    assert sample(run, tmp_path / "b.npz", *drafted)[0] == plain
    assert "not trained with registers of offset 2, 3, 6, which" in capsys.readouterr().err
    trained(run, {"kind": "set", "d_max": 4, "offsets": [3, 2]})
    assert load_run(run).trained_offsets == (2, 3)
    assert sample(run, tmp_path / "s.npz", *drafted)[0] == plain
    assert "not trained with registers of offset 4, 5, 6, which" in capsys.readouterr().err
    sample(run, tmp_path / "c.npz", "--draft", "6")
    assert "not trained" not in capsys.readouterr().err


def test_a_model_without_registers_drafts_with_the_window_and_says_so(run_of, tmp_path, capsys):
    run = run_of()
    trained(run, {"kind": "none", "d_max": 4}, register_offsets=None)
    drafted, _ = sample(run, tmp_path / "s.npz", "--draft", "100", "--draft-source", "registers")
    assert "was trained without registers; the first drafts come from the window" in capsys.readouterr().err
    about = json.loads((tmp_path / "s.json").read_text())
    assert (about["draft"], about["draft_source"]) == (16, "window")
    assert drafted == sample(run, tmp_path / "plain.npz")[0]
