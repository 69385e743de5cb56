"""Published codes become the store that encoding the images would make, and what is wrong with them is named."""

import json

import numpy as np
import pytest
from PIL import Image

from mutor_img.data.store import Codes
from tokenizer import load_tokenizer, store
from tokenizer.encode import main as encode
from tokenizer.import_codes import main
from tokenizer.inspect import main as inspect

CLASSES = ("a", "b", "c")


@pytest.fixture
def encoded(tokenizer_run, image_folder, tmp_path):
    """A factory of (tokenizer run, image folder, store that tokenizer.encode made of them)."""
    def build(*more):
        run, images = tokenizer_run(), image_folder(classes=CLASSES)
        encode(["--tokenizer", str(run), "--images", str(images), "--out", str(tmp_path / "encoded"), "--workers", "0",
                *more])
        return run, images, Codes(tmp_path / "encoded")

    return build


def write_randar(root, codes):
    """As RandAR names them: numbers of images in the order of its tar file, which is any."""
    for number, (views, label) in enumerate(zip(codes.codes, codes.labels)):
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        np.save(root / str(label) / f"{9 * number}.npy", views.astype(np.int64))
    return root


def write_llamagen(root, codes, processes=1):
    """As LlamaGen's script on so many processes, which fill up their equal shares with the first images."""
    for kind in ("codes", "labels"):
        (root / f"imagenet8_{kind}").mkdir(parents=True)
    for number in range(-(-len(codes) // processes) * processes):
        image = number % len(codes)
        np.save(root / "imagenet8_codes" / f"{number}.npy", codes.codes[None, image].astype(np.int64))
        np.save(root / "imagenet8_labels" / f"{number}.npy", codes.labels[image : image + 1])
    return root


def write_lines(path, codes):
    """As 1d-tokenizer's script with --ten_crop."""
    rows = [{"class_id": int(label), "tokens": view.tolist()} for views, label in zip(codes.codes, codes.labels)
            for view in views]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LAYOUTS = [("randar", write_randar, ()), ("llamagen", write_llamagen, ("--crop", "ten-crop")),
           ("maskgit-jsonl", write_lines, ("--crop", "ten-crop"))]


def arguments(kind, source, run, classes, out):
    return ["--format", kind, "--source", str(source), "--tokenizer", str(run), "--classes", str(classes),
            "--out", str(out)]


@pytest.mark.parametrize("kind, write, crop", LAYOUTS, ids=[name for name, *_ in LAYOUTS])
def test_the_store_is_the_one_that_encoding_the_images_makes(encoded, tmp_path, capsys, kind, write, crop):
    run, images, codes = encoded(*crop)
    words = arguments(kind, write(tmp_path / "published", codes), run, images, tmp_path / "out")
    main(words)
    found = Codes(tmp_path / "out")
    found.verify()
    for name in ("codes.npy", "labels.npy"):
        assert (found.folder / name).read_bytes() == (codes.folder / name).read_bytes()
    ours, theirs = found.info.to_json(), codes.info.to_json()
    assert {name for name in ours if ours[name] != theirs[name]} == {"images_hash"}  # files, not images, are named
    main(words)
    assert "nothing to do" in capsys.readouterr().out
    inspect(["--codes", str(found.folder), "--out", str(tmp_path / "grid.png"), "--num", "6"])
    assert Image.open(tmp_path / "grid.png").size == (6 * 98 + 2, 114)


def test_files_that_repeat_the_first_images_are_left_out_with_a_note(encoded, tmp_path, capsys):
    run, images, codes = encoded()  # 12 images: 5 processes write 15 files
    source = write_llamagen(tmp_path / "published", codes, processes=5)
    main(arguments("llamagen", source / "imagenet8_codes", run, images, tmp_path / "out"))
    assert "the last 3 files repeat the first ones" in capsys.readouterr().err
    assert (tmp_path / "out" / "codes.npy").read_bytes() == (codes.folder / "codes.npy").read_bytes()


def test_after_a_kill_the_same_command_goes_on(encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PART", 2)
    run, images, codes = encoded()
    words = arguments("randar", write_randar(tmp_path / "published", codes), run, images, tmp_path / "out")
    write, made = store.StoreWriter.write, []

    def killed(self, part, *given):
        if part == 4:
            raise KeyboardInterrupt
        write(self, part, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.StoreWriter, "write", killed)
        main(words)
    monkeypatch.setattr(store.StoreWriter, "write", lambda self, part, *a: (made.append(part), write(self, part, *a)))
    main(words)
    assert made == [4, 5]
    assert (tmp_path / "out" / "codes.npy").read_bytes() == (codes.folder / "codes.npy").read_bytes()


DAMAGE = [
    ("randar", lambda r: np.save(r / "1" / "54.npy", np.full((2, 16), 16)), "1/54.npy: code 16 is outside"),
    ("randar", lambda r: np.save(r / "1" / "54.npy", np.full((2, 16), -1)), "1/54.npy: code -1 is outside"),
    ("randar", lambda r: np.save(r / "1" / "54.npy", np.zeros((2, 9), int)), "1/54.npy: int64 of shape (2, 9)"),
    ("randar", lambda r: np.save(r / "1" / "54.npy", np.zeros((2, 16))), "1/54.npy: float64 of shape (2, 16)"),
    ("randar", lambda r: np.save(r / "1" / "54.npy", np.array([{}]), allow_pickle=True), "1/54.npy: not a readable"),
    ("randar", lambda r: (r / "1" / "54.npy").write_bytes(b"\x93NUMPY"), "1/54.npy: not a readable"),
    ("randar", lambda r: np.save(r / "0" / "0.npy", np.zeros((3, 16), int)), "0/0.npy: 3 views"),
    ("randar", lambda r: np.save(r / "0" / "0.npy", np.zeros(16, int)), "0/0.npy: an array of shape (16,)"),
    ("randar", lambda r: np.save(r / "0" / "0.npy", np.zeros((2, 15), int)), "0/0.npy: 15 codes per view"),
    ("randar", lambda r: (r / "2").rename(r / "3"), "3/72.npy: label 3 is outside of the 3 classes"),
    ("randar", lambda r: (r / "2").rename(r / "n02"), "n02: expected RandAR's folders"),
    ("randar", lambda r: (r / "1" / "54.npy").rename(r / "1" / "54.npy.part"), "54.npy.part: expected files"),
    ("llamagen", lambda r: (r / "imagenet8_codes" / "5.npy").unlink(), "imagenet8_codes/5.npy: no such file"),
    ("llamagen", lambda r: (r / "imagenet8_labels" / "11.npy").unlink(), "imagenet8_labels/11.npy: no such file"),
    ("llamagen", lambda r: np.save(r / "imagenet8_labels" / "5.npy", np.arange(2)), "imagenet8_labels/5.npy: int64"),
    ("llamagen", lambda r: (r / "imagenet16_codes").mkdir(), "several (imagenet16_codes, imagenet8_codes)"),
]


@pytest.mark.parametrize("kind, damage, words", DAMAGE, ids=[words for *_, words in DAMAGE])
def test_damage_is_one_line_that_names_the_file(encoded, tmp_path, refused, kind, damage, words):
    run, images, codes = encoded()
    source = (write_randar if kind == "randar" else write_llamagen)(tmp_path / "published", codes)
    damage(source)
    assert words in refused(main, *arguments(kind, source, run, images, tmp_path / "out"))
    assert not (tmp_path / "out" / "codes.json").exists()


@pytest.mark.parametrize("change, words", [
    (lambda lines: lines[:-1], "119 lines; expected 10 for each"),
    (lambda lines: [*lines[:44], lines[90], *lines[45:]], "line 45 has class 2, but line 41 has class 1"),
    (lambda lines: [*lines[:44], "{}", *lines[45:]], "line 45 is not of the form"),
    (lambda lines: [*lines[:44], '{"class_id": 1, "tokens": [1.5]}', *lines[45:]], "line 45 is not of the form"),
    (lambda lines: [*lines[:44], '{"class_id": 1, "tokens": [1, 2]}', *lines[45:]], ":41: [2, 16] codes on a line"),
    (lambda lines: [*lines[:40], lines[40].replace("[", "[9, "), *lines[41:]], ":41: [16, 17]"),
    (lambda lines: ["not JSON", *lines[1:]], "line 1 is not of the form"),
])
def test_lines_that_are_not_ten_crops_are_refused_with_their_number(encoded, tmp_path, refused, change, words):
    run, images, codes = encoded("--crop", "ten-crop")
    source = write_lines(tmp_path / "lines.jsonl", codes)
    source.write_text("".join(f"{line}\n" for line in change(source.read_text().splitlines())))
    line = refused(main, *arguments("maskgit-jsonl", source, run, images, tmp_path / "out"))
    assert words in line and "lines.jsonl" in line


def test_what_the_files_do_not_say_must_be_said(tmp_path, refused):
    given = ["--format", "randar", "--source", tmp_path, "--out", tmp_path / "out"]
    assert "--tokenizer is missing" in refused(main, *given, "--classes", "imagenet-1k")
    assert "--classes is missing" in refused(main, *given, "--tokenizer", "vq")
    assert "'randar'" in refused(main, "--format", "rand-ar", *given[2:])


@pytest.mark.parametrize("write", [write_randar, write_llamagen], ids=["randar", "llamagen"])
def test_other_codes_in_files_of_the_same_names_and_sizes_are_other_codes(encoded, tmp_path, refused, write):
    run, images, codes = encoded("--crop", "ten-crop")
    kind = write.__name__.removeprefix("write_")
    main(arguments(kind, write(tmp_path / "one", codes), run, images, tmp_path / "out"))
    codes.codes = (np.array(codes.codes) + 1) % 8
    words = arguments(kind, write(tmp_path / "other", codes), run, images, tmp_path / "out")
    assert "holds other codes (content_hash is" in refused(main, *words)
    about = tmp_path / "out" / "encode.json"
    about.write_text(json.dumps({name: value for name, value in json.loads(about.read_text()).items()
                                 if name not in ("content_hash", "seal")}))
    main(words)  # made before the content was noted


def test_a_crop_scale_belongs_to_ten_crops(encoded, tmp_path, refused):
    run, images, codes = encoded()
    words = arguments("randar", write_randar(tmp_path / "published", codes), run, images, tmp_path / "out")
    assert "--crop-scale is for ten crops" in refused(main, *words, "--crop-scale", "1.05")


def test_another_tokenizer_than_that_of_a_half_made_store_begins_anew(encoded, tokenizer_run, tmp_path, refused):
    run, images, codes = encoded()
    source, other = write_randar(tmp_path / "published", codes), tokenizer_run("other", seed=1)
    main(arguments("randar", source, run, images, tmp_path / "out"))
    line = refused(main, *arguments("randar", source, other, images, tmp_path / "out"))
    assert "holds other codes" in line and load_tokenizer(other).hash in line
    assert "format is mutor_img encode 1" in refused(main, *arguments("randar", source, run, images, codes.folder))
