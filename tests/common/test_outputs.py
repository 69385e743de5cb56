"""An output that is an input is refused, whatever the two paths look like."""

import os
from pathlib import Path

import pytest

from mutor_img.common.errors import UserError
from mutor_img.common.outputs import keep_apart, keep_unseen, refuse_strange_folder


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """A file with a link and a second name, images with links out of them, a run, and a code store."""
    monkeypatch.chdir(tmp_path)
    for folder in ("images/a", "elsewhere", "run/checkpoints/step_00000001", "codes"):
        Path(folder).mkdir(parents=True)
    for name in ("x.npz", "images/a/1.png", "photo.png", "codes/codes.json"):
        Path(name).touch()
    os.link("x.npz", "second.npz")
    for name, target in {"link.npz": "x.npz", "dangling": "new.npz", "also": "images", "images/b": "../elsewhere",
                         "images/a/2.png": "../../photo.png"}.items():
        Path(name).symlink_to(target)


@pytest.mark.parametrize("out, source", [
    ("x.npz", "x.npz"), ("./images/../x.npz", "x.npz"), ("x.npz", "link.npz"), ("link.npz", "x.npz"),
    ("second.npz", "x.npz"), ("dangling", "new.npz"), ("new.npz", "./new.npz"), ("images", "images"),
    ("images/c", "images"), ("images/a/o.json", "images"), ("also/o.json", "images"), ("images/o.json", "also"),
    ("elsewhere/o.png", "images"), ("photo.png", "images"), ("images/a/2.png", "images"), ("run", "run"),
    ("run/config.yaml", "run"), ("run/checkpoints/o.npz", "run"), ("codes/encode.json", "codes"),
    ("run/checkpoints/step_00000001/o.json", "run/checkpoints/step_00000001"),
])
def test_an_input_is_not_written_over_and_its_folder_not_into(out, source):
    for given in (out, Path(out).absolute()):
        with pytest.raises(UserError, match=r"^--out .* --in") as caught:
            keep_apart({"--out": given, "--grid": None}, {"--in": ["other.npz", source], "--on": None})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("out, source", [
    ("y.npz", "x.npz"), ("images2/o.png", "images"), ("elsewhere2", "images"), ("run/samples.npz", "run"),
    ("run/sweep/sweep.json", "run"), ("codes/codes.png", "codes"), ("images.json", "images"),
])
def test_what_stands_beside_is_free(out, source):
    keep_apart({"--out": out}, {"--in": source})


def test_a_folder_that_may_not_be_listed_is_passed_over(monkeypatch):
    Path("images/lost+found").mkdir()
    real = os.scandir

    def scandir(path):
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        keep_apart({"--out": "y.npz"}, {"--in": "images"})
        with pytest.raises(UserError, match="--in"):
            keep_apart({"--out": "photo.png"}, {"--in": "images"})


def test_two_outputs_are_two_paths_and_none_lies_in_another():
    keep_apart({"--out": ["digits", "digits/manifest.json"], "--grid": "digits.png"}, {})
    with pytest.raises(UserError, match=r"--\w+ and --\w+ are both"):
        keep_apart({"--out": "g.png", "--grid": "./g.png"}, {})
    with pytest.raises(UserError, match=r"--grid .* lies in digits, which is that of --out"):
        keep_apart({"--out": "digits", "--grid": "digits/g.png"}, {})


def test_nothing_that_is_read_lies_in_a_folder_that_is_removed():
    with pytest.raises(UserError, match=r"--in x\.npz\.parts/in lies in x\.npz\.parts, which --out fills and removes"):
        keep_apart({"--out": "x2.npz"}, {"--in": "x.npz.parts/in"}, {"--out": "x.npz.parts"})


@pytest.mark.parametrize("folder", ["images", "elsewhere/..", "codes"])
def test_a_folder_of_other_things_is_refused(folder):
    with pytest.raises(UserError, match=r"run_dir .* holds no run but .* give a folder of its own"):
        refuse_strange_folder("run_dir", folder, {"config.yaml", "checkpoints"}, "run")


def test_a_folder_of_its_own_is_not_refused():
    Path("logs").mkdir()
    for name in ("slurm-17.out", "notes.txt", ".lock"):
        Path("logs", name).touch()
    for folder in ("run", "new", "new/too", "elsewhere", "logs"):
        refuse_strange_folder("run_dir", folder, {"config.yaml", "checkpoints"}, "run")


def test_held_out_images_are_others_than_those_that_were_seen():
    for other in ("images", "also", "./images/../images"):
        with pytest.raises(UserError, match="--held-out and --reference are both images"):
            keep_unseen("--held-out", "images", "--reference", other)
    keep_unseen("--held-out", "images", "--reference", "elsewhere")
