"""The code store: right codes, the same bytes however it was made, and nothing reused that should not be."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from launching import launch_command
from PIL import Image, ImageFile

from mutor_img.common import files
from mutor_img.common.errors import UserError
from mutor_img.data.store import Codes
from mutor_img.training.runtime import Runtime
from tokenizer import encode, load_tokenizer, store
from tokenizer.encode import main, parse_views, view_names
from tokenizer.images.crops import CropRule, center_rule, to_float
from tokenizer.images.folder import list_images


def run_encode(run, images, out, *more):
    main(["--tokenizer", str(run), "--images", str(images), "--out", str(out), "--workers", "0", *more])
    return Codes(out)


def content(out):
    return {name: (out / name).read_bytes() for name in ("codes.npy", "labels.npy", "codes.json", "encode.json")}


def test_codes_and_labels_are_those_of_each_image(tokenizer_run, image_folder, tmp_path):
    run, images = tokenizer_run(), image_folder()
    codes = run_encode(run, images, tmp_path / "out")
    codes.verify()
    folder, vq = list_images(images), load_tokenizer(run)
    for index in range(12):
        pixels = to_float(torch.from_numpy(np.array(Image.open(folder.path(index)))))[None, None]
        found, label = codes.batch(np.array([index, index]), np.array([0, 1]))
        assert torch.equal(found, torch.cat([vq.encode(pixels), vq.encode(pixels.flip(-1))]))
        assert label.tolist() == [index // 4] * 2
    info = codes.info
    assert (info.grid, info.vocabulary) == ((4, 4), 16)
    assert (info.class_names, info.views) == (["a", "b", "c"], ["plain", "mirror"])
    assert (info.crop, info.image_size, info.tokenizer, info.tokenizer_hash) == ("center", 8, str(run), vq.hash)
    assert not (tmp_path / "out" / "parts").exists()


def test_a_vocabulary_too_large_for_uint16_is_stored_as_uint32(tiny_vq, image_folder, tmp_path):
    vq, folder = tiny_vq(vocabulary=70_000, code_dim=8), list_images(image_folder())
    codes = encode.encode_images(vq, folder, tmp_path / "out", runtime=Runtime(torch.device("cpu")))
    codes.verify()
    pixels = torch.stack([to_float(torch.from_numpy(np.array(Image.open(folder.path(i))))) for i in range(12)])
    found, _ = codes.batch(np.arange(12), np.zeros(12, int))
    assert torch.equal(found, vq.encode(pixels[:, None])) and int(found.max()) > 65535
    assert codes.codes.dtype == np.uint32
    np.save(codes.folder / "codes.npy", codes.codes.astype(np.uint16))
    with pytest.raises(UserError, match="3-dimensional uint16; expected 3-dimensional uint32"):
        Codes(codes.folder)


def test_two_processes_and_another_batch_size_write_the_same_bytes(tokenizer_run, image_folder, processes, tmp_path):
    run, images = tokenizer_run(), image_folder(each=8)  # 24 images: three parts
    run_encode(run, images, tmp_path / "one")
    launch_command(processes, 2, main, ["--tokenizer", run, "--images", images, "--out", tmp_path / "two", "--workers",
                                        "0", "--batch-size", "7"])
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_parts_that_cannot_be_removed_end_no_encoding(tokenizer_run, image_folder, tmp_path, monkeypatch, capsys):
    run, images, out = tokenizer_run(), image_folder(), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(16, "busy", str(path))))
        run_encode(run, images, out).verify()
    assert f"{out / 'parts'} cannot be removed (busy)" in capsys.readouterr().err and (out / "parts").is_dir()
    run_encode(run, images, out)
    assert "nothing to do" in capsys.readouterr().out and not (out / "parts").exists()


@pytest.mark.parametrize("seen", ["nothing", "a part of other images"])
def test_a_part_that_another_process_wrote_is_waited_for_and_then_missed(tokenizer_run, image_folder, tmp_path,
                                                                         monkeypatch, seen):
    monkeypatch.setattr(store, "PART", 2)
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    run, images, out = tokenizer_run(), image_folder(), tmp_path / "out"
    write = store.StoreWriter.write

    def elsewhere(self, part, codes, unreadable):
        if part == 4:
            self.out, self.parts = tmp_path, tmp_path / "another_disk"
        write(self, part, codes, unreadable)
        self.out, self.parts = out, out / "parts"
        if part == 4 and seen != "nothing":
            shutil.copy(self._path(3), self._path(4))

    monkeypatch.setattr(store.StoreWriter, "write", elsewhere)
    with pytest.raises(UserError, match=r"part_000004\.safetensors: this process does not see what another one wrote"):
        run_encode(run, images, out)


def test_after_a_kill_only_what_is_missing_is_made(tokenizer_run, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PART", 2)
    run, images = tokenizer_run(), image_folder()
    run_encode(run, images, tmp_path / "whole")
    write, made = store.StoreWriter.write, []

    def killed(self, part, codes, unreadable):
        if part == 4:
            raise KeyboardInterrupt
        write(self, part, codes, unreadable)

    monkeypatch.setattr(store.StoreWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run_encode(run, images, tmp_path / "cut")
    with pytest.raises(UserError, match=r"codes\.json is missing"):
        Codes(tmp_path / "cut")
    damaged = tmp_path / "cut" / "parts" / "part_000001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    monkeypatch.setattr(store.StoreWriter, "write", lambda self, part, *a: (made.append(part), write(self, part, *a)))
    run_encode(run, images, tmp_path / "cut")
    assert made == [1, 4, 5]
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_parts_of_another_tokenizer_or_image_are_made_again(tokenizer_run, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PART", 4)
    images, out = image_folder(), tmp_path / "out"
    made, write = [], store.StoreWriter.write
    monkeypatch.setattr(store.StoreWriter, "write", lambda self, part, *a: (made.append(part), write(self, part, *a)))
    monkeypatch.setattr(store.StoreWriter, "merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    first, second = tokenizer_run("first"), tokenizer_run("second", seed=1)
    for run, more, expected in ((first, (), [0, 1, 2]), (first, (), []), (second, (), [0, 1, 2]),
                                (second, ("--views", "plain"), [0, 1, 2])):
        made.clear()
        with pytest.raises(KeyboardInterrupt):
            run_encode(run, images, out, *more)
        assert made == expected
    Image.new("L", (9, 9), 7).save(images / "b" / "0001.png")
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        run_encode(second, images, out, "--views", "plain")
    assert made == [1]


def test_a_finished_store_is_reused_and_another_one_refused(tokenizer_run, image_folder, tmp_path, capsys, refused):
    run, images, out = tokenizer_run(), image_folder(), tmp_path / "out"
    run_encode(run, images, out)
    before = content(out)
    run_encode(run, images, out, "--batch-size", "3")
    assert "nothing to do" in capsys.readouterr().out and content(out) == before
    words = ("--tokenizer", run, "--images", images, "--out", out, "--workers", 0)
    assert "views is" in refused(main, *words, "--views", "plain")
    assert "image_size is 8, but now it is 12" in refused(main, *words, "--image-size", 12)
    other = tokenizer_run("other", seed=1)
    line = refused(main, "--tokenizer", other, *words[2:])
    assert load_tokenizer(run).hash in line and load_tokenizer(other).hash in line
    (images / "c" / "0003.png").unlink()
    assert "images is 12, but now it is 11" in refused(main, *words)


def test_unreadable_images_are_listed_and_refused_or_left_out(tokenizer_run, image_folder, tmp_path, capsys, refused):
    run, images, out = tokenizer_run(), image_folder(), tmp_path / "out"
    whole = run_encode(run, images, tmp_path / "whole")
    broken = images / "b" / "0002.png"
    content_before = broken.read_bytes()
    broken.write_bytes(content_before[:40])
    words = ("--tokenizer", run, "--images", images, "--out", out, "--workers", 0)
    line = refused(main, *words)
    assert "1 of 12 images" in line and "b/0002.png" in line and "--max-unreadable 1" in line
    assert (out / "unreadable.txt").read_text() == "b/0002.png\n"
    codes = run_encode(run, images, tmp_path / "fewer", "--max-unreadable", "1")
    assert str(broken) in capsys.readouterr().err
    kept = [i for i in range(12) if i != 6]
    assert np.array_equal(codes.codes, whole.codes[kept]) and np.array_equal(codes.labels, whole.labels[kept])
    assert list(json.loads((tmp_path / "fewer" / "encode.json").read_text())["unreadable"]) == ["b/0002.png"]
    broken.write_bytes(content_before)
    assert np.array_equal(run_encode(run, images, out).codes, whole.codes)  # mended: the same command goes on
    assert not (out / "unreadable.txt").exists()


def test_links_that_lead_nowhere_and_pipes_are_unreadable_images(tokenizer_run, image_folder, tmp_path, refused):
    run, images = tokenizer_run(), image_folder()
    whole = run_encode(run, images, tmp_path / "whole")
    (images / "a" / "0001.png").unlink()
    (images / "a" / "0001.png").symlink_to("gone.png")
    os.mkfifo(images / "b" / "pipe.png")
    words = ("--tokenizer", run, "--images", images, "--out", tmp_path / "out", "--workers", 0)
    assert "2 of 13 images" in refused(main, *words, "--max-unreadable", 1)
    codes = run_encode(run, images, tmp_path / "out", "--max-unreadable", "2")
    unreadable = json.loads((tmp_path / "out" / "encode.json").read_text())["unreadable"]
    assert "a link to gone.png" in unreadable["a/0001.png"] and "not a plain file" in unreadable["b/pipe.png"]
    assert np.array_equal(codes.codes, np.delete(whole.codes, 1, 0))
    (images / "aa").symlink_to("gone")
    assert "aa: a link to gone, which cannot be reached" in refused(main, *words, "--max-unreadable", 9)


def test_a_decoder_that_fails_in_a_way_of_its_own_is_an_unreadable_image(tokenizer_run, image_folder, tmp_path,
                                                                         monkeypatch, capsys):
    run, images = tokenizer_run(), image_folder()
    Image.new("L", (37, 41)).save(images / "b" / "0002.png")
    load = ImageFile.ImageFile.load

    def fail(image):
        if image.size == (37, 41):
            raise NotImplementedError
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert len(run_encode(run, images, tmp_path / "out", "--max-unreadable", "1")) == 11
    assert "b/0002.png: not a readable image (NotImplementedError)" in capsys.readouterr().err


def test_one_of_several_splits_is_encoded(tokenizer_run, image_folder, tmp_path, refused):
    run, images = tokenizer_run(), image_folder("both/train")
    image_folder("both/val", classes=("a", "b", "c", "d"))
    words = ("--tokenizer", run, "--images", images.parent, "--out", tmp_path / "out", "--workers", 0)
    assert "holds the splits train, val" in refused(main, *words)
    assert "no split 'test' in it" in refused(main, *words, "--split", "test")
    assert run_encode(run, images.parent, tmp_path / "out", "--split", "val").info.class_names == ["a", "b", "c", "d"]


def test_what_cannot_be_encoded_is_refused_in_one_line(tokenizer_run, image_folder, tmp_path, refused):
    run, images, out = tokenizer_run(), image_folder(), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    words = ["--tokenizer", run, "--images", images, "--out", out]
    assert "no such folder" in refused(main, "--tokenizer", run, "--images", tmp_path / "no", "--out", out)
    assert "no class folders" in refused(main, "--tokenizer", run, "--images", tmp_path / "empty", "--out", out)
    assert "no such file or folder" in refused(main, "--tokenizer", tmp_path / "no", *words[2:])
    assert "'mirror'" in refused(main, *words, "--views", "plain,miror")
    assert "twice" in refused(main, *words, "--views", "plain,plain")
    assert "'center'" in refused(main, *words, "--crop", "centre")
    assert "multiple of 2" in refused(main, *words, "--image-size", 9)
    assert "--batch-size" in refused(main, *words, "--batch-size", 0)
    assert "'--views'" in refused(main, *words, "--view", "plain")
    assert "--tokenizer" in refused(main, "--images", images, "--out", out)
    assert not out.exists()


def test_views_are_named_for_each_square_that_a_rule_cuts():
    rule = CropRule("sides", ("left", "right"), lambda image, side, number: [image, image])
    assert view_names(parse_views(None, rule), rule) == ("plain-left", "plain-right", "mirror-left", "mirror-right")
    assert view_names(parse_views("mirror", center_rule()), center_rule()) == ("mirror",)


def test_a_rule_of_several_squares_gives_several_views(tokenizer_run, image_folder, tmp_path, monkeypatch):
    def cut(image, side, number):
        return [image.crop((0, 0, side, side)), image.crop((image.width - side, 0, image.width, side))]

    monkeypatch.setitem(encode.CROPS, "sides", lambda: CropRule("sides", ("left", "right"), cut))
    codes = run_encode(tokenizer_run(), image_folder(size=12), tmp_path / "out", "--crop", "sides")
    assert codes.codes.shape == (12, 4, 16) and codes.info.views[1] == "plain-right" and codes.info.crop == "sides"
    assert not np.array_equal(codes.codes[:, 0], codes.codes[:, 1])
