"""sample.py's files: the npz and its manifest, bytes that depend on the settings alone, and kills at any moment."""

import json
import os
import shutil
import signal
import traceback
import zipfile

import numpy as np
import pytest
import torch
from launching import launch_command, start_sampling
from PIL import Image
from tiny_runs import NAMES, edit_flags, sample

from mutor_img.common import files
from mutor_img.common.errors import UserError
from mutor_img.decoding.sampler import Sampler, generate
from mutor_img.metrics.image_sets import read_all
from mutor_img.metrics.samples import open_samples
from mutor_img.sampling import archive as archive_module
from mutor_img.sampling import main
from tokenizer import load_tokenizer


def test_the_npz_is_adms_format_and_holds_what_generate_and_decode_give(run_of, random_model, tmp_path):
    run, out = run_of(), tmp_path / "s.npz"
    assert sample(run, out, "--seed", "4") == out
    arrays = np.load(out)
    images, labels = arrays["arr_0"], arrays["arr_1"]
    assert arrays.files == ["arr_0", "arr_1"] and images.shape == (150, 8, 8, 3) and images.dtype == np.uint8
    assert labels.shape == (150,) and labels.dtype == np.int64 and set(labels) == {0, 1, 2}
    codes = generate(random_model((4, 4)), torch.from_numpy(labels[70:80]), seed=4, first=70)
    pixels = load_tokenizer(tmp_path / "tokenizer").decode(codes)  # (10, 1, 8, 8)
    expected = np.floor(np.clip(pixels.numpy() * 127.5 + 128, 0, 255)).astype(np.uint8)[:, 0, :, :, None]
    assert np.array_equal(images[70:80], expected.repeat(3, -1))


def test_the_npz_is_stored_as_numpy_stores_it_with_a_fixed_time(run_of, tmp_path):
    sample(run_of(), tmp_path / "s.npz")
    np.savez(tmp_path / "numpy.npz", **np.load(tmp_path / "s.npz"))
    ours, theirs = (zipfile.ZipFile(tmp_path / name) for name in ("s.npz", "numpy.npz"))
    for name in ("arr_0.npy", "arr_1.npy"):
        assert ours.read(name) == theirs.read(name)
        assert ours.getinfo(name).date_time == (1980, 1, 1, 0, 0, 0)
        assert ours.getinfo(name).compress_type == zipfile.ZIP_STORED


def test_the_manifest_says_what_made_the_samples(run_of, tmp_path):
    run = run_of()
    sample(run, tmp_path / "s.npz", "--cfg-scale", "1.5", "--top-k", "5", "--classes", "red fox,0")
    manifest = json.loads((tmp_path / "s.json").read_text())
    vq = load_tokenizer(tmp_path / "tokenizer")
    expected = {"weights": "raw", "tokenizer_hash": vq.hash, "cfg_scale": 1.5, "cfg_schedule": "constant", "top_k": 5,
                "top_p": 1.0, "temperature": 1.0, "dtype": "fp32", "seed": 0, "labels": "random", "classes": [2, 0],
                "num_samples": 150, "class_names": NAMES, "step": 3, "tokenizer": vq.path,
                "checkpoint": f"{run}/checkpoints/step_00000003"}
    assert {key: manifest[key] for key in expected} == expected
    assert len(manifest["weights_hash"]) == 64 and set(manifest["versions"]) == {"mutor_img", "torch", "numpy"}
    assert set(np.load(tmp_path / "s.npz")["arr_1"]) == {0, 2}


def forked(work):
    """Run ``work()`` in a copy of this process, which saves the import of torch; returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.mark.parametrize(("world", "drafts"), [
    (2, ()), (3, ()), (2, ("--draft", "4", "--draft-source", "registers")), (3, ("--draft", "auto"))], ids=str)
def test_the_bytes_do_not_depend_on_batch_size_number_of_processes_or_drafts(
        run_of, tmp_path, processes, world, drafts):
    run = run_of()
    expected = sample(run, tmp_path / "one.npz", count=136).read_bytes()  # 3 parts, the last of 8 images
    for size in (1, 30 * world, 1000):
        out = tmp_path / f"{size}.npz"
        assert sample(run, out, "--batch-size", str(size), *drafts, count=136).read_bytes() == expected
    launch_command(processes, world, main, ["--checkpoint", run, "--num-samples", 136, "--batch-size", 30, *drafts,
                                            "--out", tmp_path / "several.npz"])
    assert (tmp_path / "several.npz").read_bytes() == expected


def test_the_bytes_of_edited_images_do_not_depend_on_the_number_of_processes_or_drafts(run_of, tmp_path, processes):
    run, edits = run_of(), [*edit_flags(tmp_path), "--mix-with", "dog"]
    expected = sample(run, tmp_path / "one.npz", *edits, count=70).read_bytes()
    launch_command(processes, 2, main, ["--checkpoint", run, "--num-samples", 70, "--draft", 4, *edits,
                                        "--out", tmp_path / "two.npz"])
    assert (tmp_path / "two.npz").read_bytes() == expected


def test_torchrun_launches_the_command(run_of, tmp_path):
    run = run_of()
    process = start_sampling("--checkpoint", run, "--num-samples", 70, "--out", "two.npz", processes=2, cwd=tmp_path)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0 and output.count("two.npz: 70 images") == 1, errors
    assert (tmp_path / "two.npz").read_bytes() == sample(run, tmp_path / "one.npz", count=70).read_bytes()


@pytest.mark.parametrize("name", ["s.npz", "s/"])
def test_parts_that_cannot_be_removed_end_no_sampling(run_of, tmp_path, monkeypatch, capsys, name):
    run, out = run_of(), f"{tmp_path}/{name}"
    parts = tmp_path / f"{name.strip('/')}.parts"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(16, "busy", str(path))))
        sample(run, out, count=20)
    assert f"{parts} cannot be removed (busy)" in capsys.readouterr().err and parts.is_dir()
    sample(run, out, count=20)
    assert "nothing to do" in capsys.readouterr().out and not parts.exists()


@pytest.mark.parametrize("name", ["s.npz", "s"])
def test_parts_of_unknown_settings_are_made_anew(run_of, tmp_path, name):
    run, parts = run_of(), tmp_path / f"{name}.parts"
    parts.mkdir()  # as a removal leaves them that took the settings first and was killed
    np.savez(parts / "part_000000.npz", images=np.zeros((64, 8, 8, 3), np.uint8))
    sample(run, tmp_path / "whole.npz", count=70)
    made = read_all(open_samples(sample(run, tmp_path / name, count=70)))
    assert np.array_equal(made, np.load(tmp_path / "whole.npz")["arr_0"]) and not parts.exists()


def test_a_part_that_another_process_wrote_is_waited_for_and_then_missed(run_of, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    write = archive_module.SampleArchive.write
    monkeypatch.setattr(archive_module.SampleArchive, "write", lambda self, unit, images: (
        write(self, unit, images) if unit != 1 else None))
    with pytest.raises(UserError, match=r"part_000001\.npz: this process does not see what another one wrote"):
        sample(run_of(), tmp_path / "s.npz")


def test_a_longer_run_begins_with_the_images_of_a_shorter_one(run_of, tmp_path):
    run = run_of()
    short, long = (np.load(sample(run, tmp_path / f"{n}.npz", count=n)) for n in (70, 150))
    assert all(np.array_equal(long[name][:70], short[name]) for name in ("arr_0", "arr_1"))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_part():
    """Die within the second part, half of whose bytes are on the disk."""
    def write(path, save):
        if path.name != "part_000001.npz":
            return real(path, save)
        aside = path.with_name(f".{path.name}.part")
        save(aside)
        os.truncate(aside, aside.stat().st_size // 2)
        die()

    real, archive_module.write_atomic = archive_module.write_atomic, write


def die_in_the_npz():
    """Die between the npz's two arrays."""
    real = archive_module.write_array
    archive_module.write_array = lambda file, name, *rest: die() if name == "arr_1.npy" else real(file, name, *rest)


def die_before_the_manifest():
    """Die when the npz has its name and its manifest is not there."""
    real = archive_module.write_sealed
    archive_module.write_sealed = lambda path, value: die() if path.name == "s.json" else real(path, value)


def die_among_pictures():
    """Die when some of a folder's PNGs are written."""
    real = archive_module.Image.fromarray
    archive_module.Image.fromarray = lambda image, seen=[]: die() if len(seen) == 40 else seen.append(0) or real(image)


@pytest.mark.parametrize("doom", [die_in_a_part, die_in_the_npz, die_before_the_manifest, die_among_pictures])
def test_a_process_killed_at_any_moment_leaves_no_half_file_and_goes_on(run_of, tmp_path, doom):
    run = run_of()
    with np.load(sample(run, tmp_path / "whole.npz")) as file:
        expected = dict(file)
    folder = tmp_path / "here"
    out = folder / ("s" if doom is die_among_pictures else "s.npz")
    pid = forked(lambda: (doom(), sample(run, out)))
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert (folder / f"{out.name}.parts").is_dir() and out.exists() == (doom is die_before_the_manifest)
    if out.exists():
        assert np.array_equal(np.load(out)["arr_0"], expected["arr_0"])
    assert sample(run, out) == out
    if out.is_dir():
        images = [np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))]
        assert np.array_equal(images, expected["arr_0"]) and sorted(folder.iterdir()) == [out]
        assert json.loads((out / "labels.json").read_text()) == expected["arr_1"].tolist()
    else:
        assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
        assert sorted(folder.iterdir()) == [folder / "s.json", out]


def test_parts_of_a_killed_run_are_not_made_again(run_of, tmp_path, monkeypatch):
    run, out, made = run_of(), tmp_path / "s.npz", []
    os.waitpid(forked(lambda: (die_in_a_part(), sample(run, out))), 0)
    assert {path.name for path in (tmp_path / "s.npz.parts").glob("part*")} == {"part_000000.npz"}
    real = Sampler.generate
    monkeypatch.setattr(Sampler, "generate", lambda self, labels, numbers: made.extend(numbers.tolist()) or real(
        self, labels, numbers))
    sample(run, out)
    assert made == list(range(64, 150))


def test_a_folder_holds_the_images_of_the_npz_and_says_what_made_them(run_of, tmp_path, capsys):
    run, out = run_of(), tmp_path / "pictures.of.digits"
    out.mkdir()  # an empty folder is no obstacle
    assert main(["--checkpoint", run, "--out", f"{out}/", "--num-samples", "70"]) == out
    whole = np.load(sample(run, tmp_path / "s.npz", count=70))
    names = [f"{number:06d}.png" for number in range(70)]
    assert sorted(path.name for path in out.iterdir()) == [*names, "labels.json", "manifest.json"]
    assert np.array_equal([np.asarray(Image.open(out / name)) for name in names], whole["arr_0"])
    assert json.loads((out / "labels.json").read_text()) == whole["arr_1"].tolist()
    assert (out / "manifest.json").read_text() == (tmp_path / "s.json").read_text()
    main(["--checkpoint", run, "--out", f"{out}/", "--num-samples", "70"])
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="was made with seed 0, now it is 1; remove it"):
        main(["--checkpoint", run, "--out", f"{out}/", "--num-samples", "70", "--seed", "1"])
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"exists without its manifest manifest\.json"):
        main(["--checkpoint", run, "--out", f"{out}/", "--num-samples", "70"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")  # no folder can take its name: said before anything is sampled
    with pytest.raises(UserError, match="link: exists without its manifest"):
        main(["--checkpoint", run, "--out", str(tmp_path / "link"), "--num-samples", "70"])


def test_a_finished_run_is_not_made_again(run_of, tmp_path, capsys):
    run, out = run_of(), tmp_path / "s.npz"
    sample(run, out)
    before = out.stat().st_mtime_ns
    sample(run, out, "--batch-size", "7")
    assert out.stat().st_mtime_ns == before and "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "words"), [
    (["--cfg-scale", "3"], "made with cfg_scale 2.0, now it is 3.0"), (["--seed", "1"], "with seed 0, now it is 1"),
    (["--labels", "balanced"], "labels random, now it is balanced"), (["--dtype", "bf16"], "fp32, now it is bf16"),
    (["--classes", "1"], "classes None, now it is [1]"), (["--num-samples", "80"], "num_samples 70"),
])
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_samples_of_other_settings_are_refused(run_of, tmp_path, monkeypatch, flags, words, finished):
    run, out = run_of(), tmp_path / "s.npz"
    if not finished:
        monkeypatch.setattr(archive_module.SampleArchive, "merge", lambda *arguments: None)
    sample(run, out, count=70)
    with pytest.raises(UserError, match="choose another --out") as error:
        sample(run, out, *flags, count=70)
    assert words in str(error.value)


def test_a_manifest_of_samples_that_are_gone_goes_before_others_are_made(run_of, tmp_path, monkeypatch):
    run, out = run_of(), tmp_path / "s.npz"
    sample(run, out, count=4)
    out.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(archive_module.SampleArchive, "merge", lambda *arguments: None)
        sample(run, out, "--seed", "1", count=4)
    assert not (tmp_path / "s.json").exists()
    sample(run, out, "--seed", "1", count=4)
    assert json.loads((tmp_path / "s.json").read_text())["seed"] == 1


@pytest.mark.parametrize("flag", ["--grid", "--show-steps"])
def test_samples_that_are_refused_leave_the_picture_beside_them(run_of, tmp_path, flag):
    run, out, picture = run_of(), tmp_path / "s.npz", tmp_path / "p.png"
    sample(run, out, flag, str(picture), count=4)
    before = picture.read_bytes()
    with pytest.raises(UserError, match="made with seed 0, now it is 1"):
        sample(run, out, flag, str(picture), "--seed", "1", count=4)
    assert picture.read_bytes() == before


def test_other_weights_and_strange_files_are_refused(run_of, tmp_path):
    out = tmp_path / "s.npz"
    sample(run_of(), out, count=70)
    with pytest.raises(UserError, match="was made with weights_hash"):
        sample(run_of("other", seed=1), out, count=70)
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(UserError, match="was not made by this program"):
        sample(run_of(), out, count=70)
    (tmp_path / "t.json").mkdir()
    with pytest.raises(UserError, match=r"the manifest of t\.npz would overwrite it"):
        sample(run_of(), tmp_path / "t.npz", count=70)
    (tmp_path / "s.json").unlink()
    with pytest.raises(UserError, match="exists without its manifest"):
        sample(run_of(), out, count=70)
