"""sample.py: the npz and its manifest, bytes that depend on the settings alone, grids, and mistakes in one line."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from tiny_runs import NAMES, write_tokenizer

from mutor_img.checkpoints.folder import write_checkpoint
from mutor_img.common import files
from mutor_img.common.errors import UserError
from mutor_img.decoding import cpu as decoder_module
from mutor_img.decoding.sampler import Sampler, SamplingSettings, generate
from mutor_img.sampling import archive as archive_module
from mutor_img.sampling import draw_training_grid, main, sample_images
from mutor_img.sampling.labels import class_words, make_labels, parse_classes, readable_names
from mutor_img.sampling.pictures import GREY
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def sample(run, out, *flags, count=150):
    return main(["--checkpoint", run, "--out", str(out), "--num-samples", str(count), *flags])


def command(*flags, processes=1, **options):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    program = [sys.executable, *(launch if processes > 1 else ()), str(ROOT / "sample.py"), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
                            **options)


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


def rank(index, world, port, flags):
    """Be one of ``world`` processes that torchrun would start."""
    os.environ.update({"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(world),
                       "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
    PartialState._reset_state()
    main(flags)


@pytest.mark.parametrize("world", [2, 3])
def test_the_bytes_do_not_depend_on_batch_size_or_number_of_processes(run_of, tmp_path, world):
    run = run_of()
    expected = sample(run, tmp_path / "one.npz", count=200).read_bytes()  # 4 parts, the last of 8 images
    for size in (1, 50 * world, 1000):
        out = tmp_path / f"{size}.npz"
        assert sample(run, out, "--batch-size", str(size), count=200).read_bytes() == expected
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "several.npz"
    flags = ["--checkpoint", run, "--num-samples", "200", "--out", str(out), "--batch-size", "30"]
    ranks = [forked(partial(rank, index, world, port, flags)) for index in range(world)]
    assert [os.waitpid(pid, 0)[1] for pid in ranks] == [0] * world
    assert out.read_bytes() == expected


def test_torchrun_launches_the_command(run_of, tmp_path):
    run = run_of()
    process = command("--checkpoint", run, "--num-samples", 70, "--out", "two.npz", processes=2, cwd=tmp_path)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0 and output.count("two.npz: 70 images") == 1, errors
    assert (tmp_path / "two.npz").read_bytes() == sample(run, tmp_path / "one.npz", count=70).read_bytes()


@pytest.mark.parametrize("name", ["s.npz", "s/"])
def test_parts_that_cannot_be_removed_end_no_sampling(run_of, tmp_path, monkeypatch, capsys, name):
    run, out = run_of(), f"{tmp_path}/{name}"
    parts = tmp_path / f"{name.strip('/')}.parts"
    (parts / "whole").mkdir(parents=True)  # left by a kill
    (parts / "whole" / "000000.png").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(16, "busy", str(path))))
        sample(run, out, count=20)
    assert f"{parts} cannot be removed (busy)" in capsys.readouterr().err and parts.is_dir()
    sample(run, out, count=20)
    assert "nothing to do" in capsys.readouterr().out and not parts.exists()


def test_a_part_that_another_process_wrote_is_waited_for_and_then_missed(run_of, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    write = archive_module.SampleArchive.write
    monkeypatch.setattr(archive_module.SampleArchive, "write", lambda self, unit, images: (
        write(self, unit, images) if unit != 1 else None))
    with pytest.raises(UserError, match=r"part_000001\.npy: this process does not see what another one wrote"):
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
        if path.name != "part_000001.npy":
            return real(path, save)
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
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
    real = archive_module.write_json
    archive_module.write_json = lambda path, value: die() if path.name == "s.json" else real(path, value)


def die_among_pictures():
    """Die when some of a folder's PNGs are written."""
    real = archive_module._flush
    archive_module._flush = lambda path: die() if path.name == "000040.png" else real(path)


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
    assert {path.name for path in (tmp_path / "s.npz.parts").glob("part*")} == {"part_000000.npy"}
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


def test_other_weights_and_strange_files_are_refused(run_of, tmp_path):
    out = tmp_path / "s.npz"
    sample(run_of(), out, count=70)
    with pytest.raises(UserError, match="was made with weights_hash"):
        sample(run_of("other", seed=1), out, count=70)
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(UserError, match="was not made by this program"):
        sample(run_of(), out, count=70)
    (tmp_path / "s.json").unlink()
    with pytest.raises(UserError, match="exists without its manifest"):
        sample(run_of(), out, count=70)


def test_random_labels_are_uniform_and_each_a_function_of_its_number():
    labels = make_labels("random", range(10), 20_000, 3)
    counts = labels.bincount(minlength=10).double()
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 27.9  # chi-squared, 9 degrees of freedom, 0.1 %
    assert torch.equal(make_labels("random", range(10), 100, 3), labels[:100])
    assert not torch.equal(make_labels("random", range(10), 100, 4), labels[:100])
    assert torch.equal(make_labels("random", [7], 5, 0), torch.full((5,), 7))


def test_balanced_labels_are_as_many_of_each_in_an_order_of_the_seed():
    labels = make_labels("balanced", [4, 5, 6, 9], 4003, 0)
    counts = labels.bincount(minlength=10)
    assert sorted(counts[[4, 5, 6, 9]].tolist()) == [1000, 1001, 1001, 1001] and counts.sum() == 4003
    other = make_labels("balanced", [4, 5, 6, 9], 4003, 1)
    assert not torch.equal(labels, other)
    assert 0.2 < float((labels[1:] == labels[:-1]).double().mean()) < 0.3  # shuffled: a quarter repeats
    left_over = {int(make_labels("balanced", range(4), 1, seed)) for seed in range(40)}
    assert left_over == {0, 1, 2, 3}


def test_classes_are_numbers_or_names():
    wordnet = ["n01440764", "n02099601", "n02012849"]
    names = readable_names(wordnet, 3)
    assert names == ["tench", "golden retriever", "crane"]
    assert parse_classes("2, Golden_Retriever", names, wordnet) == [2, 1]
    assert parse_classes("n01440764", names, wordnet) == [0]
    assert parse_classes("Tinca tinca,2", names, wordnet) == [0, 2]  # a synonym
    assert readable_names(None, 2) == ["0", "1"] and readable_names(None, 1000)[207] == "golden retriever"
    for text, words in (("3", "classes 0 to 2"), ("tensh", "did you mean 'tench'"), ("-1", "unknown class '-1'"),
                        ("1,1", "class 1 is given twice"), ("", "unknown class ''"), ("1,tench,0", "given twice"),
                        ("n02099602", "did you mean 'n02099601'")):
        with pytest.raises(UserError, match=words):
            parse_classes(text, names, wordnet)
    imagenet = readable_names(None, 1000)
    assert parse_classes("n02099601,otter", imagenet) == [207, 360]
    with pytest.raises(UserError, match="name of classes 134, 517; give a number"):
        parse_classes("crane", imagenet)
    with pytest.raises(UserError, match="give a number from 0 to 999, a name or a WordNet id"):
        parse_classes("zzzzzzzz", imagenet)


def numbered(count, digits=1):
    """The names of class folders 1 to count, in the order in which folders are numbered."""
    return sorted(str(number).zfill(digits) for number in range(1, count + 1))


@pytest.mark.parametrize(("names", "text", "labels"), [
    (numbered(12), "name:10,name:1", [1, 0]), (numbered(12), "label:10,12", [10, 3]), (numbered(12), "0", [0]),
    (numbered(12, 3), "010", [9]), (numbered(12, 3), "label:10,012", [10, 11]), (numbered(12, 3), "12", [11]),
    ([str(digit) for digit in range(10)], "7,0", [7, 0]), (["a", "label:0", "b"], "label:0,label:2", [1, 2]),
    (["zero", "one", "10"], "10,1", [2, 1]), (["a:b", "name:x"], "a:b,name:x", [0, 1]),
])
def test_a_word_is_a_name_before_it_is_a_number(names, text, labels):
    assert parse_classes(text, names) == labels


@pytest.mark.parametrize(("names", "word", "both"), [
    (numbered(12), "10", "name of class 1 and the number of class 10 ('8'); give name:10 or label:10"),
    (numbered(12), "1", "name of class 0 and the number of class 1 ('10')"),
    (numbered(12), "010", "name of class 1 and the number of class 10"),
    (numbered(12, 3), "10", "name of class 9 and the number of class 10 ('011')"),
    (["1", "0"], "0", "name of class 1 and the number of class 0 ('1')"),
    (["2", "b", "c"], "2", "name of class 0 and the number of class 2 ('c')"),
])
def test_a_word_that_is_a_name_and_another_classs_number_is_refused(names, word, both):
    with pytest.raises(UserError) as caught:
        parse_classes(f"{word}", names)
    assert both in str(caught.value)


def test_labels_are_told_by_words_that_mean_no_other_class():
    for names in (numbered(12), numbered(12, 3), NAMES, numbered(2)):
        labels = list(range(len(names)))[::-1]
        assert parse_classes(class_words(labels, names), names) == labels
    assert class_words([999, 0], readable_names(None, 1000)) == "999,0"
    assert class_words([2, 0], NAMES) == "2,0" and class_words([0, 10], numbered(12)) == "0,label:10"


def test_every_command_that_takes_classes_reads_them_alike(run_of, tmp_path):
    run = run_of(class_names=["1", "2", "0"])
    with pytest.raises(UserError, match="name of class 0 and the number of class 1"):
        sample(run, tmp_path / "s.npz", "--classes", "1", count=2)
    labels = np.load(sample(run, tmp_path / "s.npz", "--classes", "name:1", count=3))["arr_1"]
    assert labels.tolist() == [0, 0, 0]


def test_a_grid_has_a_row_for_each_class_and_the_same_images_as_python_gives(run_of, random_model, tmp_path):
    run, path = run_of(), tmp_path / "grid.png"
    assert main(["--checkpoint", run, "--classes", "2,cat", "--grid", str(path), "--num-samples", "5"]) == path
    picture = np.asarray(Image.open(path))
    images = sample_images(random_model((4, 4)), load_tokenizer(tmp_path / "tokenizer"),
                           torch.tensor([2, 2, 2, 0, 0, 0]), torch.arange(6), SamplingSettings())
    large = images.repeat(12, 1).repeat(12, 2)  # 8 pixels are shown at 96
    left = picture.shape[1] - (3 * 98 + 2)
    for index, image in enumerate(large):
        row, column = divmod(index, 3)
        y, x = 2 + 98 * row, left + 2 + 98 * column
        assert np.array_equal(picture[y:y + 96, x:x + 96], image)
    assert left > 20 and (picture[:, :left] < 128).any()  # the names


def test_a_grid_without_classes_shows_them_all_and_goes_with_an_npz(run_of, tmp_path, capsys):
    main(["--checkpoint", run_of(), "--grid", str(tmp_path / "g.png"), "--out", str(tmp_path / "s.npz"),
          "--num-samples", "10"])
    assert "3 classes, 8 images each" in capsys.readouterr().out and (tmp_path / "s.npz").exists()


def test_the_batch_size_cuts_a_grid_into_batches(run_of, tmp_path, monkeypatch):
    run, seen = run_of(), []
    real = Sampler.generate
    monkeypatch.setattr(Sampler, "generate", lambda self, labels, *rest: seen.append(len(labels)) or real(self, labels,
                                                                                                       *rest))
    for name, size in (("a", 64), ("b", 10)):
        main(["--checkpoint", run, "--grid", str(tmp_path / f"{name}.png"), "--batch-size", str(size)])
    assert seen == [24, 10, 10, 4] and (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_strip_shows_the_first_image_as_its_codes_arrive(run_of, tmp_path):
    run, path = run_of(), tmp_path / "strip.png"
    assert main(["--checkpoint", run, "--show-steps", str(path)]) == path
    picture = np.asarray(Image.open(path))
    final = np.load(sample(run, tmp_path / "s.npz", count=1))["arr_0"][0]
    final = final.repeat(12, 0).repeat(12, 1)  # 8 pixels are shown at 96
    left = picture.shape[1] - (8 * 98 + 2)
    frames = [picture[2:98, left + 2 + 98 * frame:left + 98 + 98 * frame] for frame in range(8)]
    assert np.array_equal(frames[7], final) and not np.array_equal(frames[6], final)
    for count, frame in zip(range(2, 18, 2), frames):  # 4 x 4 codes, two per frame, each a cell of 24 pixels
        grey = [(frame[y:y + 24, x:x + 24] == GREY).all() for y in range(0, 96, 24) for x in range(0, 96, 24)]
        assert grey == [False] * count + [True] * (16 - count)


@pytest.mark.parametrize("flags", [["--classes", "1"], ["--seed", "3"], ["--labels", "balanced", "--seed", "5"]],
                         ids=str)
def test_a_strip_is_of_the_first_image_of_the_same_flags(run_of, tmp_path, flags):
    run, path = run_of(), tmp_path / "strip.png"
    final = np.load(sample(run, tmp_path / "s.npz", "--show-steps", str(path), *flags, count=5))["arr_0"][0]
    assert np.array_equal(np.asarray(Image.open(path))[2:98, -98:-2], final.repeat(12, 0).repeat(12, 1))


def test_the_training_grid_needs_the_runs_metadata_alone(run_of, random_model, tmp_path):
    vq = write_tokenizer(tmp_path / "vq")
    codes = {"tokenizer": vq.path, "tokenizer_hash": vq.hash, "class_names": NAMES, "image_size": 8, "path": "codes"}
    pictures = SimpleNamespace(cfg_scale=2.0, per_class=2)
    draw_training_grid(random_model((4, 4)), codes, pictures, 0, tmp_path / "a.png")
    kept = len(decoder_module._PACKED)
    draw_training_grid(model := random_model((4, 4)).train(), codes, pictures, 0, tmp_path / "b.png")
    assert len(decoder_module._PACKED) == kept and model.training  # no second copy of the weights stays
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(UserError, match="sha256"):
        draw_training_grid(random_model((4, 4)), {**codes, "tokenizer_hash": "0" * 64}, pictures, 0, tmp_path / "c.png")


@pytest.mark.parametrize("flags", [
    ["--seed", "1"], ["--cfg-scale", "6"], ["--temperature", "0.3"], ["--top-k", "1"], ["--top-p", "0.2"],
    ["--labels", "balanced"], ["--classes", "1"], ["--dtype", "bf16"], ["--cfg-schedule", "linear"],
    ["--cfg-schedule", "power-cosine", "--cfg-parameter", "2"], ["--cfg-schedule", "interval", "--cfg-parameter", "1"],
], ids=" ".join)
def test_every_flag_that_decides_samples_changes_them(run_of, tmp_path, flags):
    run = run_of()
    plain, changed = sample(run, tmp_path / "a.npz", count=20), sample(run, tmp_path / "b.npz", *flags, count=20)
    assert plain.read_bytes() != changed.read_bytes()


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
    (["--out", "s.npz", "--device", "tpu"], "--device"), (["--out", "s.npz", "--tokenizer", "absent"], "absent"),
    (["--out", "s.npz", "--cfg-schedule", "interval"], "needs cfg-parameter"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_mistake_is_one_clear_line(run_of, tmp_path, monkeypatch, flags, words):
    run = run_of()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        main(["--checkpoint", run, *flags])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("s.*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(tmp_path):
    with pytest.raises(UserError, match="--device cuda: there is no CUDA device here"):
        main(["--checkpoint", "absent", "--out", str(tmp_path / "s.npz"), "--device", "cuda"])


@pytest.mark.parametrize(("codes", "words"), [
    ({"tokenizer_hash": "0" * 64}, "were made by a tokenizer with 0000000000000000"),
    ({"tokenizer": "/absent/vq"}, "/absent/vq: no such file or folder"), ({"tokenizer": None}, "give --tokenizer"),
    ({"image_size": 16}, "codes of 16 pixels"),
], ids=str)
def test_a_tokenizer_that_does_not_fit_is_refused(run_of, tmp_path, codes, words):
    with pytest.raises(UserError, match=words):
        sample(run_of(**codes), tmp_path / "s.npz")


def test_a_tokenizer_of_another_vocabulary_is_refused(run_of, tmp_path):
    write_tokenizer(tmp_path / "large", vocabulary=12)
    with pytest.raises(UserError, match=r"has 12 codes, but .* makes 11"):
        sample(run_of(), tmp_path / "s.npz", "--tokenizer", str(tmp_path / "large"))


def test_the_command_exits_2_with_one_line_for_a_mistake(tmp_path):
    process = command("--checkpoint", tmp_path / "absent", "--out", "s.npz", cwd=tmp_path)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2 and errors.startswith("error: ") and len(errors.splitlines()) == 1
