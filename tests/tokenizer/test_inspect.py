"""Looking at a code store, and refusing to look through another tokenizer."""

import numpy as np
import pytest
from PIL import Image

from tokenizer import load_tokenizer
from tokenizer.encode import main as encode
from tokenizer.inspect import main


def build(run, images, out):
    encode(["--tokenizer", str(run), "--images", str(images), "--out", str(out), "--workers", "0"])
    return out


def test_the_picture_shows_decoded_codes_and_the_facts_are_printed(tokenizer_run, image_folder, tmp_path, capsys):
    codes = build(tokenizer_run(), image_folder(), tmp_path / "codes")
    main(["--codes", str(codes), "--out", str(tmp_path / "grid.png"), "--num", "6", "--verify"])
    out = capsys.readouterr().out
    assert "12 in 3 classes (a, b, c)" in out and "plain, mirror" in out and "is right (blocks: 1)" in out
    assert Image.open(tmp_path / "grid.png").size == (6 * 98 + 2, 114)  # 8 pixels magnified 12 times, with captions


def test_another_tokenizer_is_refused_naming_both(tokenizer_run, image_folder, tmp_path, refused):
    run, other = tokenizer_run("run"), tokenizer_run("other", seed=1)
    codes = build(run, image_folder(), tmp_path / "codes")
    line = refused(main, "--codes", codes, "--tokenizer", other, "--out", tmp_path / "grid.png")
    assert load_tokenizer(run).hash[:16] in line and load_tokenizer(other).hash[:16] in line
    assert not (tmp_path / "grid.png").exists()


def test_a_changed_code_is_found(tokenizer_run, image_folder, tmp_path, refused):
    codes = build(tokenizer_run(), image_folder(), tmp_path / "codes")
    array = np.load(codes / "codes.npy", mmap_mode="r+")
    array[7, 1, 3] ^= 1
    array.flush()
    assert "block 0" in refused(main, "--codes", codes, "--verify", "--out", tmp_path / "grid.png")


@pytest.mark.parametrize("name, place, value, words", [
    ("codes.npy", (7, 0, 3), 16, "holds the code 16, but codes go up to 15"),
    ("labels.npy", 5, 3, "holds the label 3, but labels go up to 2"), ("labels.npy", 5, -1, "holds the label -1")])
def test_what_is_out_of_range_is_one_line_without_checksums_too(tokenizer_run, image_folder, tmp_path, refused, name,
                                                                place, value, words):
    codes = build(tokenizer_run(), image_folder(), tmp_path / "codes")
    array = np.load(codes / name, mmap_mode="r+")
    array[place] = value
    array.flush()
    line = refused(main, "--codes", codes, "--out", tmp_path / "grid.png")
    assert words in line and "--verify names the block" in line and not (tmp_path / "grid.png").exists()


def test_a_folder_without_codes_is_refused(tmp_path, refused):
    assert "no codes here" in refused(main, "--codes", tmp_path)


def test_a_picture_that_is_no_png_is_refused_before_anything_is_read(tmp_path, refused):
    assert "codes.txt: must end in .png" in refused(main, "--codes", tmp_path / "missing", "--out", "codes.txt")
