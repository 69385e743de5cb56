"""Tar files: the images of the folder, and no image lost without a word."""

import tarfile

import numpy as np
import pytest
from shards import content, write_tar, write_tars

from mutor_img.common.errors import UserError
from tokenizer.images.folder import list_images
from tokenizer.images.layouts import open_images


def test_tar_files_hold_the_images_of_the_folder(tree, tmp_path):
    folder = list_images(tree)
    source = open_images(write_tars(tmp_path / "tars", folder, lambda i: b"%d\n" % folder.labels[i]), classes=tree)
    assert np.array_equal(source.labels, folder.labels) and source.sizes == folder.sizes
    assert all(content(source, i) == content(folder, i) for i in np.random.default_rng(0).permutation(128))


@pytest.fixture
def two(tmp_path):
    """A file with two classes."""
    (tmp_path / "two").write_text("a\nb\n")
    return tmp_path / "two"


SAMPLE = [("0.jpg", b"first"), ("0.cls", b"0")]


@pytest.mark.parametrize("members, message", [
    ([*SAMPLE, *SAMPLE], "0.jpg is a second file with the key '0', after 0.jpg"),
    ([*SAMPLE, ("0.png", b"x")], "0.png is a second file with the key '0', after 0.jpg"),
    ([*SAMPLE, ("0.cls", b"1")], "0.cls is a second file with the key '0'"),
    ([*SAMPLE, ("1.jpg", (tarfile.LNKTYPE, "0.jpg")), ("1.cls", b"1")], "1.jpg in it is not a plain file but a link"),
    ([*SAMPLE, ("1.jpg", (tarfile.SYMTYPE, "0.jpg")), ("1.cls", b"1")], "1.jpg in it is not a plain file but a link")])
def test_a_tar_never_loses_an_image_without_a_word(members, message, tmp_path, two):
    with pytest.raises(UserError, match=rf"x\.tar: {message}"):
        open_images(write_tar(tmp_path / "tars" / "x.tar", *members), classes=two)


def test_one_sample_in_two_tars_is_refused_and_one_key_for_two_images_noted(tmp_path, two):
    write_tar(tmp_path / "tars" / "x-0.tar", *SAMPLE)
    folder = write_tar(tmp_path / "tars" / "x-1.tar", ("0.jpg", b"other"), ("0.cls", b"1"))
    source = open_images(folder, classes=two)
    assert source.files == ["x-0.tar:0.jpg", "x-1.tar:0.jpg"] and source.labels.tolist() == [0, 1]
    assert "1 images have a key that an earlier tar file uses for another image" in " ".join(source.notes())
    write_tar(tmp_path / "tars" / "x-2.tar", ("9.jpg", b"9"), ("9.cls", b"1"), ("0.jpg", b"other"), ("0.cls", b"1"))
    with pytest.raises(UserError, match=r"x-2\.tar:0\.jpg is the same as x-1\.tar:0\.jpg, byte for byte"):
        open_images(folder, classes=two)


def test_members_that_are_hidden_are_passed_over(tmp_path, two):
    hidden = [(name, b"x") for name in ("._0.jpg", "._0.cls", "a/.cache/0.jpg", "__MACOSX/0.jpg", "a/@eaDir/0.jpg")]
    folder = write_tar(tmp_path / "tars" / "x.tar", *hidden, ("./a/1.JPG", b"1"), ("./a/1.CLS", b"1"))
    source = open_images(folder, classes=two)
    assert source.files == ["x.tar:./a/1.JPG"] and source.left_out == []


def test_what_follows_a_damaged_header_or_a_first_archive_is_not_lost_without_a_word(tmp_path, two):
    folder = write_tar(tmp_path / "tars" / "x.tar", *SAMPLE, ("1.jpg", b"1"), ("1.cls", b"1"))
    whole = (folder / "x.tar").read_bytes()
    for damaged in (whole[:2048] + b"\xff" + whole[2049:], whole + whole):
        (folder / "x.tar").write_bytes(damaged)
        with pytest.raises(UserError, match=r"x\.tar: holds more after its last readable member"):
            open_images(folder, classes=two)


@pytest.mark.parametrize("label, classes, message", [
    (b"3", None, r"labels in tar files are numbers; .*--classes"),
    (b"1000", "imagenet-1k", r"train-0000\.tar:00000\.jpg: label 1000 is outside 0 to 999"),
    (b"tench", "imagenet-1k", r"00000\.cls is not a number"),
    (None, "imagenet-1k", r"00000\.jpg has no 00000\.cls"),
])
def test_other_tar_files_are_refused(label, classes, message, tree, tmp_path):
    folder = write_tars(tmp_path / "tars", list_images(tree), lambda i: label)
    with pytest.raises(UserError, match=message):
        open_images(folder, classes=classes)
    (folder / "train-0000.tar").write_bytes(b"\x1f\x8b and so on, compressed" * 100)
    with pytest.raises(UserError, match="not a readable tar file" if classes else message):
        open_images(folder, classes=classes)


def test_the_archives_own_tars_are_to_be_unpacked(tmp_path):
    (tmp_path / "n01440764.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"n01440764\.tar: the tar file of one class.*unpack each"):
        open_images(tmp_path)
    (tmp_path / "n01440764").mkdir()
    with pytest.raises(UserError, match="no images in this class folder"):
        open_images(tmp_path)  # beside class folders a tar is left over
