"""python -m mutor_img.app: what is served where, and mistakes in one line. Gradio takes no part."""

import os
import socket
import sys

import pytest
from tiny_runs import NAMES, write_generator, write_tokenizer

from mutor_img.app import command
from mutor_img.app.command import main
from mutor_img.common.cli import run
from mutor_img.common.errors import UserError


def test_two_checkpoints_are_served_on_this_machine_alone(served, two_runs, free_port):
    seen = served("--checkpoint", two_runs[0], "--compare", two_runs[1], "--cfg-scale", "3", "--classes",
                  "red fox,0", "--cfg-schedule", "linear")
    assert seen.where == ("127.0.0.1", free_port)
    assert [side.path for side in seen.sides] == list(two_runs)
    assert len({side.source.loaded.weights_hash for side in seen.sides}) == 2
    for side in seen.sides:
        assert side.source.classes == [2, 0] and side.source.names == NAMES
        assert (side.source.settings.cfg_scale, side.source.settings.cfg_schedule) == (3.0, "linear")
        assert side.title == f"{side.path} · step 3 · raw weights · fp32"


def test_one_checkpoint_is_served_alone(served, two_runs):
    seen = served("--checkpoint", two_runs[1])
    assert len(seen.sides) == 1 and seen.sides[0].source.rule == "balanced"
    assert seen.runs is None and seen.share is False


def test_uploads_have_a_folder_of_their_own_that_goes_with_the_page(served, tmp_path):
    seen = served("--runs", str(tmp_path))
    assert os.environ["GRADIO_TEMP_DIR"] == str(seen.uploads) and not seen.uploads.exists()
    assert seen.private and served("--runs", str(tmp_path)).uploads != seen.uploads


def test_a_folder_of_runs_is_served_without_a_checkpoint_or_beside_one(served, two_runs, tmp_path):
    seen = served("--runs", str(tmp_path))
    assert seen.sides == [] and seen.runs == tmp_path
    seen = served("--runs", str(tmp_path), "--checkpoint", two_runs[0])
    assert len(seen.sides) == 1 and seen.runs == tmp_path


def test_a_public_address_is_opened_only_if_it_is_asked_for(served, tmp_path):
    assert served("--runs", str(tmp_path), "--share").share is True


@pytest.mark.parametrize(("flags", "words"), [
    ([], "--checkpoint is missing, or --runs"), (["--runs", "gone"], "--runs gone: no such folder"),
    (["--runs", "."], "--compare has no use without --checkpoint")], ids=str)
def test_flags_that_leave_nothing_to_show_are_refused(served, flags, words):
    with pytest.raises(UserError, match=words):
        served(*flags, "--compare", "other")


def test_sampling_flags_need_a_checkpoint(served, tmp_path):
    with pytest.raises(UserError, match="--cfg-scale has no use without --checkpoint"):
        served("--runs", str(tmp_path), "--cfg-scale", "3")


def test_without_gradio_one_line_names_the_extra(monkeypatch, capsys, two_runs):
    monkeypatch.setitem(sys.modules, "gradio", None)  # importing it fails, installed or not
    monkeypatch.delitem(sys.modules, "mutor_img.app.page", raising=False)
    monkeypatch.delattr("mutor_img.app.page", raising=False)
    with pytest.raises(SystemExit) as stop:
        run(main, ["--checkpoint", two_runs[0]])
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and len(errors.splitlines()) == 1
    assert errors.startswith("error: ") and "pip install 'mutor_img[app]'" in errors


def test_an_old_gradio_is_refused(monkeypatch, two_runs):
    monkeypatch.setattr(command, "version", lambda name: "5.49.1")
    with pytest.raises(UserError, match=r"needs Gradio 6\.31 or newer, and 5\.49\.1 is installed; pip install"):
        main(["--checkpoint", two_runs[0]])


def test_a_taken_port_is_refused_before_anything_is_loaded(served):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="is taken by another program; give another one"):
            served("--checkpoint", "absent", "--port", str(other.getsockname()[1]))


@pytest.mark.parametrize(("flags", "words"), [
    (["--port", "0"], "--port is 0"), (["--port", "65536"], "--port is 65536"), (["--port", "x"], "invalid int"),
    (["--compare", "absent"], "absent"), (["--tokenizer", "absent"], "absent"),
    (["--shared"], "did you mean '--share'"), (["--cfg-scale", "0"], "cfg_scale is 0.0"),
    (["--classes", "dgo"], "did you mean 'dog'"),
    (["--labels", "rnd"], "--labels"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_mistake_is_one_clear_line(served, two_runs, flags, words):
    with pytest.raises(UserError) as error:
        served("--checkpoint", two_runs[0], *flags)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_checkpoint_is_refused(served, tmp_path):
    with pytest.raises(UserError, match="absent"):
        served("--checkpoint", str(tmp_path / "absent"))


@pytest.mark.parametrize(("changes", "codes", "words"), [
    ({"classes": 4}, {"class_names": None}, "has 4 classes, but .* has 3"),
    ({}, {"class_names": ["cat", "wolf", "red fox"]}, "class 1 is 'wolf', but that of .* is 'dog'"),
])
def test_checkpoints_of_other_classes_cannot_stand_side_by_side(served, two_runs, random_model, tmp_path, changes,
                                                               codes, words):
    other = write_generator(tmp_path / "other", random_model((4, 4), **changes), write_tokenizer(tmp_path / "vq"),
                            **codes)
    with pytest.raises(UserError, match=words):
        served("--checkpoint", two_runs[0], "--compare", other)
