"""Class folders in sorted order, and folders that are something else."""

import pytest

from mutor_img.common.errors import UserError
from mutor_img.metrics.digits import main as digits
from mutor_img.metrics.references import open_reference
from mutor_img.metrics.samples import open_samples
from tokenizer.encode import main as encode
from tokenizer.images.folder import list_images
from tokenizer.images.source import class_names
from tokenizer.reconstruct import main as reconstruct
from tokenizer.train import main as train


def test_labels_are_positions_in_sorted_order(image_folder):
    root = image_folder(classes=("zebra", "10", "9"), each=2)
    (root / "10" / "deep").mkdir()
    (root / "10" / "0000.png").rename(root / "10" / "deep" / "x.PNG")
    (root / "9" / "notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    folder = list_images(root)
    assert folder.classes == ["10", "9", "zebra"] and folder.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert folder.files == ["10/0001.png", "10/deep/x.PNG", "9/0000.png", "9/0001.png",
                            "zebra/0000.png", "zebra/0001.png"]
    assert folder.sizes == [folder.path(i).stat().st_size for i in range(6)]


def test_a_spread_reaches_every_class(image_folder):
    folder = list_images(image_folder(each=4))
    assert folder.labels[folder.spread(3)].tolist() == [0, 1, 2]
    assert folder.spread(0).tolist() == folder.spread(99).tolist() == list(range(12))


def above(root):
    root.rename(root.parent / "val")
    root.mkdir()
    (root.parent / "val").rename(root / "val")
    (root / "train").symlink_to("val")


def dangling(root):
    (root / "aa").symlink_to("gone")


def circle(root):
    (root / "a" / "up").symlink_to("..")


def hollow(root):
    (root / "aa").mkdir()


def loose(root):
    (root / "a" / "0000.png").rename(root / "grid.png")


FAULTS = {above: "holds the splits train, val", dangling: "aa: a link to gone, which cannot be reached",
          circle: "a/up: a link back", hollow: "aa: no images in this class folder",
          loose: "grid.png lies outside of the class folders"}


@pytest.mark.parametrize("spoil", FAULTS)
def test_every_command_refuses_the_same_folders(spoil, image_folder, tokenizer_run, command, tmp_path, refused):
    good, bad, run = image_folder("good"), image_folder("bad"), tokenizer_run()
    spoil(bad)
    for main, *words in (
        (encode, "--tokenizer", run, "--images", bad, "--out", tmp_path / "out"),
        (encode, "--tokenizer", run, "--images", good, "--classes", bad, "--out", tmp_path / "out"),
        (reconstruct, "--tokenizer", run, "--images", bad),
        (train, *command, f"data.images={bad}"), (train, *command, f"data.val_images={bad}"),
        (digits, "--images", bad, "--val", good, "--out", tmp_path / "out"),
        (digits, "--images", good, "--val", bad, "--out", tmp_path / "out"),
    ):
        if "--classes" in words and spoil not in (above, dangling):
            continue  # only names are read
        assert FAULTS[spoil] in refused(main, *words), (main.__module__, words)
    for read in (open_reference, open_samples):
        with pytest.raises(UserError, match=FAULTS[spoil]):
            read(bad)
    assert not (tmp_path / "out").exists()


def test_imagenet_folders_get_words():
    from timm.data import ImageNetInfo

    folders = sorted(ImageNetInfo("imagenet-1k").label_names())
    names = class_names(folders)
    assert names[0] == "tench" and names[207] == "golden retriever" and len(names) == 1000
    assert class_names(["n02102040", "n99999999", "dog"]) == ["English springer", "n99999999", "dog"]
