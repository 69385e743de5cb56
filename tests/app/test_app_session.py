"""The page's images are those of sample.py, every control bites, and what cannot be meant becomes a message."""

import dataclasses
import re
import shlex
import shutil

import numpy as np
import pytest
from tiny_runs import edit_flags

from mutor_img import sampling
from mutor_img.app.limits import Readers
from mutor_img.app.session import MAX_IMAGES, Controls, answer, command_line, sample_in_turn
from mutor_img.checkpoints.folder import newest_checkpoint

PLAIN = Controls(classes=[2, 0], labels="balanced", count=19, cfg_scale=2.0, temperature=1.0, top_k=0, top_p=1.0,
                 seed=5)
CHANGES = [{"classes": [1]}, {"labels": "random"}, {"cfg_scale": 4.5}, {"temperature": 0.3}, {"top_k": 2},
           {"top_p": 0.3}, {"seed": 6.0}, {"mix_with": [1]}, {"mix_with": [1], "mix_share": 0.9}]


def collect(sources, count):
    parts = [[] for _ in sources]
    for place, images in sample_in_turn(sources, count):
        parts[place].append(images)
    return [np.concatenate(part) for part in parts]


@pytest.fixture
def sides(served, two_runs):
    return served("--checkpoint", two_runs[0], "--compare", two_runs[1]).sides


@pytest.mark.parametrize("change", [{}, {"classes": []}, {"labels": "random", "classes": []}, {"seed": -3, "top_k": 4},
                                    {"mix_with": [2], "mix_share": 0.8, "keep": "photo.png", "mask": "mask.png"}],
                         ids=str)
def test_the_images_are_those_of_the_sample_command_that_is_shown(sides, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    edit_flags(tmp_path)
    controls = dataclasses.replace(PLAIN, **change)
    sources = [controls.apply(side.source) for side in sides]
    shown = collect(sources, controls.read_count())
    assert not np.array_equal(*shown)
    for side, source, images in zip(sides, sources, shown):
        program, script, *flags = shlex.split(command_line(side, source, controls.read_count(), "s.npz"))
        assert (program, script) == ("python", "sample.py")
        arrays = np.load(sampling.main([*flags[:-1], f"{source.loaded.weights_hash[:8]}.npz"]))
        assert np.array_equal(arrays["arr_0"], images)
        assert np.array_equal(arrays["arr_1"], source.labels(19))


def test_the_command_names_what_the_command_line_chose(served, two_runs, tmp_path):
    vq = str(tmp_path.joinpath("tokenizer of mine"))
    real = re.sub(r"first$", "tokenizer", two_runs[0])
    tmp_path.joinpath("tokenizer of mine").symlink_to(real)
    [side] = served("--checkpoint", two_runs[0], "--tokenizer", vq, "--dtype", "bf16", "--weights", "raw",
                    "--cfg-schedule", "interval", "--cfg-parameter", "3").sides
    words = shlex.split(command_line(side, PLAIN.apply(side.source), 4, "my samples.npz"))
    for flag, value in (("--tokenizer", vq), ("--dtype", "bf16"), ("--weights", "raw"), ("--num-samples", "4"),
                        ("--cfg-schedule", "interval"), ("--cfg-parameter", "3.0"), ("--classes", "2,0"),
                        ("--out", "my samples.npz")):
        assert words[words.index(flag) + 1] == value


def test_the_command_means_the_weights_that_were_loaded_though_the_run_trains_on(served, two_runs, tmp_path):
    run = shutil.copytree(two_runs[0], tmp_path / "run")
    [side] = served("--checkpoint", str(run), "--fallback").sides
    newest = newest_checkpoint(run)
    shutil.copytree(newest, newest.with_name("step_00000009"))
    words = shlex.split(command_line(side, PLAIN.apply(side.source), 4, "s.npz"))
    assert words[words.index("--checkpoint") + 1] == str(newest) and side.title.startswith(str(run))


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_control_changes_the_images(sides, change):
    source = sides[0].source
    plain, changed = (collect([controls.apply(source)], 19)[0]
                      for controls in (PLAIN, dataclasses.replace(PLAIN, **change)))
    assert plain.shape == changed.shape == (19, 8, 8, 3) and not np.array_equal(plain, changed)


@pytest.mark.app
def test_the_page_s_controls_stand_in_the_order_in_which_they_are_read(sides):
    pytest.importorskip("gradio", reason="Gradio not installed; make test-app installs it")
    from mutor_img.app.page import build_page

    [generate] = [event for event in build_page(sides[:1], None, Readers()).fns.values() if event.inputs]
    assert [each.elem_id for each in generate.inputs] == [field.name for field in dataclasses.fields(Controls)]


def test_the_sides_take_turns_with_the_same_labels(sides):
    sources = [PLAIN.apply(side.source) for side in sides]
    assert [place for place, _ in sample_in_turn(sources, 19)] == [0, 1, 0, 1, 0, 1]
    assert np.array_equal(*(source.labels(19) for source in sources))


def test_the_answer_fills_both_grids_and_ends_with_the_time(sides):
    views = list(answer(sides, PLAIN))
    assert [view.status.count("<progress") for view in views] == [1] * 7 + [0]
    assert "0 of 38 images" in views[0].status and "38 images in" in views[-1].status
    assert views[0].commands.count("python sample.py") == 2 and not any(view.commands for view in views[1:])
    first = [view.grids[0] for view in views if view.grids[0]]
    assert [html.count("<img") for html in first] == [0, 8, 16, 19]
    assert [html.count('class="pending"') for html in first] == [19, 11, 3, 0]


@pytest.mark.parametrize(("change", "words"), [
    ({"temperature": 0}, "temperature is 0.0; give a value in (0.0"), ({"cfg_scale": 0.5}, "cfg_scale is 0.5"),
    ({"top_k": 12}, "top_k is 12; give a value in [0, 11]"), ({"top_k": 1.5}, "top-k is 1.5; give a whole number"),
    ({"top_p": 0}, "top_p is 0.0"), ({"top_p": 1.1}, "top_p is 1.1"), ({"seed": None}, "seed is empty; give a number"),
    ({"seed": float("nan")}, "seed is nan"), ({"seed": 1e300}, "seed is 1"), ({"count": 0}, "number of images is 0"),
    ({"count": MAX_IMAGES + 1}, f"images is {MAX_IMAGES + 1}; give a value in [1, {MAX_IMAGES}]"),
    ({"count": float("inf")}, "number of images is inf"), ({"temperature": float("nan")}, "temperature is nan"),
    ({"count": None}, "number of images is empty"), ({"labels": "rnd"}, "labels is &#x27;rnd&#x27;"),
    ({"classes": [3]}, "class is 3; give a value in [0, 2]"), ({"mix_with": [3]}, "mix_with is 3"),
    ({"mix_with": [1], "mix_share": None}, "share is empty"), ({"keep": "photo.png"}, "nothing without --mask"),
    ({"keep": "absent.png", "mask": "absent.png"}, "absent.png: no such image file"),
], ids=str)
def test_a_value_that_cannot_be_meant_becomes_a_message(sides, change, words):
    view = list(answer(sides, dataclasses.replace(PLAIN, **change)))[-1]
    assert 'role="alert"' in view.status and words in view.status
    assert view.commands is None and view.grids == [None, None]
