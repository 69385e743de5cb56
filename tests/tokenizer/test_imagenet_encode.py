"""Encoding a tree in ImageNet's shape: odd files, broken files, any number of processes, a kill at any moment."""

import json
import os
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
from photographs import CMYK, GREY, PNG, TRUNCATED, WNIDS
from PIL import Image

from mutor_img.checkpoints.folder import write_checkpoint
from mutor_img.common.files import read_json
from mutor_img.data.store import Codes
from mutor_img.training.runtime import Runtime
from tokenizer import load_tokenizer, store
from tokenizer.encode import encode_images, main
from tokenizer.images.crops import center_crop, center_rule, random_rule
from tokenizer.images.layouts import open_images
from tokenizer.images.source import imagenet_words

SIZE = 16


@pytest.fixture
def rgb_run(tmp_path, tiny_vq):
    """A run folder of a small RGB tokenizer."""
    vq = tiny_vq(image_channels=3)
    meta = {"kind": "tokenizer", "model": vq.options, "image_size": SIZE}
    write_checkpoint(tmp_path / "rgb", 3, {"model": vq.state_dict()}, meta, keep=1)
    return tmp_path / "rgb"


def words(run, tree, out, *more):
    return [str(w) for w in ("--tokenizer", run, "--images", tree, "--out", out, "--workers", 0, *more)]


def test_names_that_are_not_utf_8_are_kept_as_they_are(rgb_run, tmp_path):
    """Old archives hold them: here a class and a broken image."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    cafe, broken = os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe9/\xff.png")
    for name in (f"{cafe}/0.png", "tea/0.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    (tmp_path / "images" / broken).write_bytes(b"no image")
    main(words(rgb_run, tmp_path / "images", tmp_path / "codes", "--max-unreadable", 1))
    assert Codes(tmp_path / "codes").info.class_names == [cafe, "tea"]
    assert list(read_json(tmp_path / "codes" / "encode.json")["unreadable"]) == [broken]
    assert (tmp_path / "codes" / "unreadable.txt").read_bytes() == b"caf\xe9/\xff.png\n"


def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}


def test_odd_files_are_read_and_a_broken_one_is_left_out_by_name(rgb_run, tree, tmp_path, capsys, refused):
    out = tmp_path / "codes"
    assert "1 of 128 images" in refused(main, *words(rgb_run, tree, out))
    assert (out / "unreadable.txt").read_text() == f"{TRUNCATED}\n"
    main(words(rgb_run, tree, out, "--max-unreadable", 1))
    printed = capsys.readouterr()
    assert "128 images in 16 classes: tench, goldfish, great white shark, brambling, " in printed.out
    assert "16 of imagenet-1k's 1000 classes" in printed.err and str(tree / TRUNCATED) in printed.err
    codes, vq, source = Codes(out), load_tokenizer(rgb_run), open_images(tree)
    kept = [i for i, name in enumerate(source.files) if name != TRUNCATED]
    assert codes.labels.tolist() == [i // 8 for i in kept] and codes.info.class_names[-1] == "banana"
    made = json.loads((out / "encode.json").read_text())
    assert list(made["unreadable"]) == [TRUNCATED] and made["classes"] == WNIDS
    for name in (CMYK, GREY, PNG, source.files[-1]):
        with Image.open(tree / name) as image:
            square = np.asarray(center_crop(image.convert("RGB"), SIZE)).astype(np.float32)
        pixels = torch.from_numpy(square / 127.5 - 1).permute(2, 0, 1)[None]
        row = codes.codes[kept.index(source.files.index(name))]
        assert row[0].tolist() == vq.encode(pixels)[0].tolist(), name
        assert row[1].tolist() == vq.encode(pixels.flip(-1))[0].tolist(), name


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(world, rgb_run, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SMALLEST", 10)  # 13 parts, the last one short
    vq, source = load_tokenizer(rgb_run), open_images(tree)
    gate, told = threading.Barrier(world), []

    class Rank(Runtime):  # processes stand for threads: what they share is files and barriers
        def barrier(self):
            gate.wait(timeout=60)

        def from_main(self, make):
            if self.is_main:
                told.append(make())
            self.barrier()
            found = told[-1]
            self.barrier()
            return found

    def encode(rank):
        encode_images(vq, source, tmp_path / "many", runtime=Rank(torch.device("cpu"), rank, world),
                      rule=random_rule(count=2), views=["plain"], batch_size=3 + rank, max_unreadable=1)

    threads = [threading.Thread(target=encode, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    encode_images(vq, source, tmp_path / "one", runtime=Runtime(torch.device("cpu")), rule=random_rule(count=2),
                  views=["plain"], max_unreadable=1)
    assert len(content(tmp_path / "one")) == 5 and content(tmp_path / "one") == content(tmp_path / "many")


def test_a_kill_at_any_moment_changes_no_byte(rgb_run, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SMALLEST", 50)
    vq, source, runtime = load_tokenizer(rgb_run), open_images(tree), Runtime(torch.device("cpu"))

    def encode(out):
        encode_images(vq, source, out, runtime=runtime, rule=center_rule(), views=["plain"], max_unreadable=1)

    encode(tmp_path / "whole")
    moments = 0
    while True:  # kill -9 as the k-th file is about to appear under its name, or to be removed
        child = os.fork()
        if child == 0:
            count = 0

            def killed(real, *args, limit=moments, **options):
                nonlocal count
                count += 1
                if count > limit:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            for module, name in ((os, "replace"), (shutil, "rmtree")):
                real = getattr(module, name)
                setattr(module, name, lambda *a, real=real, **o: killed(real, *a, **o))
            try:
                encode(tmp_path / f"cut{moments}")
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        assert (tmp_path / f"cut{moments}" / "codes.json").exists() == (moments == 8)
        encode(tmp_path / f"cut{moments}")
        assert content(tmp_path / f"cut{moments}") == content(tmp_path / "whole"), moments
        moments += 1
    # Three parts, the list of the unreadable, two arrays, two files that describe them, the folder of the parts.
    assert moments == 9


def test_ten_crops_and_random_crops_name_their_views(rgb_run, tree, tmp_path, refused):
    more = ("--max-unreadable", 1, "--classes", "imagenet-1k")
    main(words(rgb_run, tree, tmp_path / "ten", "--crop", "ten-crop", "--crop-scale", 1.05, *more))
    main(words(rgb_run, tree, tmp_path / "random", "--crop", "random", "--num-views", 3, "--seed", 5, *more))
    ten, random = Codes(tmp_path / "ten"), Codes(tmp_path / "random")
    assert ten.info.crop == "ten-crop 1.05" and len(ten.info.views) == ten.codes.shape[1] == 10
    assert ten.info.views[4:6] == ["center", "mirror-top_left"] and len(ten.info.class_names) == 1000
    assert (random.info.crop, random.info.views) == ("random 0.8 seed 5", ["random-0", "random-1", "random-2"])
    assert ten.info.images_hash == random.info.images_hash and np.array_equal(ten.labels, random.labels)
    (tmp_path / "list").write_text("\n".join([*imagenet_words(), "one more"]))
    line = refused(main, *words(rgb_run, tree, tmp_path / "random", "--crop", "random", "--num-views", 3, "--seed", 5,
                                "--classes", tmp_path / "list"))
    assert "codes of 1000 classes, which are not these 1001" in line


def test_flags_of_another_rule_and_wrong_numbers_are_refused(rgb_run, tree, tmp_path, refused):
    begin = words(rgb_run, tree, tmp_path / "out")
    for more, message in (
        (("--crop-scale", 1.1), "--crop-scale does not belong to --crop center"),
        (("--crop", "ten-crop", "--seed", 1), "--seed does not belong to --crop ten-crop"),
        (("--crop", "ten-crop", "--views", "plain"), "makes its own views"),
        (("--crop", "ten-crop", "--crop-scale", 0.9), "--crop-scale is 0.9"),
        (("--crop", "random", "--crop-min", 0), "--crop-min is 0"),
        (("--crop", "random", "--num-views", 0), "--num-views is 0"),
        (("--crop", "tencrop"), "'ten-crop'"),
    ):
        assert message in refused(main, *begin, *more)
    assert not (tmp_path / "out").exists()


def test_a_flat_folder_with_labels_gives_the_codes_of_the_class_folders(rgb_run, tree, tmp_path):
    source, flat = open_images(tree), tmp_path / "val"
    flat.mkdir()
    kept = [i for i, name in enumerate(source.files) if name != TRUNCATED][::9]
    for place, index in enumerate(kept):
        (flat / f"val_{place:04d}.JPEG").symlink_to(source.path(index))
    (tmp_path / "labels.txt").write_text("".join(f"{source.classes[source.labels[i]]}\n" for i in kept))
    main(words(rgb_run, flat, tmp_path / "flat", "--labels", tmp_path / "labels.txt", "--classes", tree))
    main(words(rgb_run, tree, tmp_path / "tree", "--max-unreadable", 1))
    found, expected = Codes(tmp_path / "flat"), Codes(tmp_path / "tree")
    rows = [i - (i > source.files.index(TRUNCATED)) for i in kept]
    assert np.array_equal(found.codes, expected.codes[rows]) and np.array_equal(found.labels, expected.labels[rows])
    assert found.info.class_names == expected.info.class_names
