"""One rule for folders of images: what is followed, passed over, listed and refused."""

import os

import pytest

from mutor_img.common.errors import UserError
from mutor_img.common.folders import GONE, enter_split, list_classes, list_folder, means_split, visible, walk


@pytest.fixture
def tree(tmp_path):
    """A function that writes empty files below tmp_path / "d" and returns that folder."""
    def write(*names, folder="d"):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / folder

    return write


HIDDEN = [".cache/x.png", ".ipynb_checkpoints/a.png", "._a.png", "__MACOSX/a.png", "@eaDir/a.png", "Thumbs.db",
          "a/.thumbnails/t.png", "a/._0.png", "a/desktop.ini", "b/@eaDir/0.png"]


def test_hidden_files_and_folders_are_as_if_they_were_not_there(tree):
    root = tree("a/0.png", "b/1.PNG", "b/deep/0.JpEg", *HIDDEN)
    found = list_folder(root)
    assert found.files == ["a/0.png", "b/1.PNG", "b/deep/0.JpEg"] and found.left_out == []
    assert (found.folders, found.places) == (["a", "b"], [0, 1, 1])
    assert list_folder(tree("0.png", *HIDDEN[:6], folder="flat")).folders is None


def test_links_to_folders_and_files_are_followed(tree, tmp_path):
    root = tree("a/0.png")
    tree("x/1.png", "2.png", folder="elsewhere")
    (root / "b").symlink_to(tmp_path / "elsewhere" / "x")
    (root / "a" / "2.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "link").symlink_to(root)
    assert list_folder(tmp_path / "link").files == ["a/0.png", "a/2.png", "b/1.png"]


@pytest.mark.parametrize("place, target", [
    ("a/up", ".."), ("a/self", "."), ("loop", "."), ("b/deep/top", "../../../d")])
def test_a_link_back_is_refused_and_never_walked_in_circles(place, target, tree):
    root = tree("a/0.png", "b/deep/0.png")
    (root / place).symlink_to(target)
    with pytest.raises(UserError, match=f"{place}.*: a link back to a folder that it lies in"):
        list_folder(root)


def test_an_image_that_is_gone_is_listed_and_a_folder_that_is_gone_refused(tree):
    root = tree("a/0.png", "b/0.png")
    (root / "a" / "1.png").symlink_to("gone.png")
    os.mkfifo(root / "a" / "2.png")  # opened, it would be waited for without end
    assert list(zip(list_folder(root).files, list_folder(root).sizes))[1:3] == [("a/1.png", GONE), ("a/2.png", GONE)]
    for name in ("aa", "b/deep", "n01440764"):
        (root / name).symlink_to("/gone")
        for read in (list_folder, walk):
            with pytest.raises(UserError, match=f"{name}: a link to /gone, which cannot be reached"):
                read(root)
        (root / name).unlink()
    (root / "c").symlink_to("c")
    with pytest.raises(UserError, match=r"c: a link to c, which cannot be reached \(Too many levels"):
        list_classes(root)


def test_a_folder_that_cannot_be_read_is_named(tree, monkeypatch):
    root, scandir = tree("a/0.png", "b/0.png"), os.scandir

    def closed(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"d/b: this folder cannot be read \(Permission denied"):
        list_folder(root)


@pytest.mark.parametrize("names, message", [
    (["a/0.png", "b/notes.txt"], "d/b: no images in this class folder"),
    (["a/0.png", "grid.png"], "grid.png lies outside of the class folders"),
    (["notes.txt"], "no PNG images or others"),
    (["train/a/0.png", "val/a/0.png"], "d: holds the splits train, val in place of classes; give .*d/train"),
    (["train/a/0.png"], "holds the splits train"),
    (["sets/train/a/0.png", "sets/test/a/0.png"], "d/sets: holds the splits test, train"),
    (["a/train_0.png", "b/val_0.png"], "holds the splits train, val .by their names"),
    (["train_0.png", "val_0.png"], "holds the splits train, val .by their names")])
def test_a_folder_of_something_else_is_refused(names, message, tree):
    with pytest.raises(UserError, match=message):
        list_folder(tree(*names))


@pytest.mark.parametrize("names, files", [
    (["train/a/0.png", "val/a/1.png"], ["a/1.png"]), (["x-train/a/0.png", "x-val/a/1.png"], ["a/1.png"]),
    (["a/train_0.png", "a/val_0.png", "b/val_1.png"], ["a/val_0.png", "b/val_1.png"]),
    (["train_0.png", "val_0.png"], ["val_0.png"])])
def test_a_split_is_taken_by_its_name_or_as_the_end_of_the_path(names, files, tree):
    root = tree(*names)
    assert list_folder(root, "val").files == list_folder(root / "val").files == files
    with pytest.raises(UserError, match=r"no split 'test' in it; .*train, val"):
        list_folder(root, "test")
    with pytest.raises(UserError, match="no such folder"):
        list_folder(root / "test")


def test_a_neighbour_that_cannot_be_listed_does_not_hide_that_nothing_is_there(tree, monkeypatch):
    root, listdir = tree("private/0.png", "a/0.png", ".cache/val_0.png"), os.listdir

    def closed(path):
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", closed)
    assert not means_split(root / "val")  # nor is a hidden folder looked into
    with pytest.raises(UserError, match="d/imagnet: no such folder"):
        list_folder(root / "imagnet")


def test_a_class_is_no_split(tree):
    root = tree("cat/0.png", "dog/0.png")
    with pytest.raises(UserError, match="no split 'cat' in it; no names in it tell splits"):
        list_folder(root, "cat")
    assert not means_split(root / "cat") and not means_split(root / "bird") and enter_split(root) == (root, None)


def test_order_depends_on_names_alone(tree):
    root = tree("b/1.png", "b/0.png", "a-b/0.png", "a/0.png", "a/z/0.png", "a/y.png")
    assert list_folder(root).files == ["a/0.png", "a/y.png", "a/z/0.png", "a-b/0.png", "b/0.png", "b/1.png"]
    assert [entry.name for entry in visible(root)] == ["a", "a-b", "b"]
