"""Flat folders with a label file, Parquet files, shards of splits, lists of classes: the same images however stored."""

import shutil
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from photographs import WNIDS
from shards import content, write_shards, write_tars

from mutor_img.common.errors import UserError
from tokenizer.images.folder import list_images
from tokenizer.images.layouts import open_images, open_unlabelled
from tokenizer.images.source import contradiction, imagenet_words, read_class_list

FORMS = {
    "kaggle": lambda labels: "ImageId,PredictionString\n" + "".join(
        f"{name},{wnid} 0 14 216 299 {wnid} 3 4 5 6 \n" for name, wnid in reversed(labels.items())),
    "name and id": lambda labels: "".join(f"{name}.JPEG {wnid}\n" for name, wnid in labels.items()),
    "csv without a header": lambda labels: "".join(f"val/{name}.JPEG,{wnid}\n" for name, wnid in labels.items()),
    "tabs and a blank line": lambda labels: "".join(f"{name}\t{wnid}\n\n" for name, wnid in labels.items()),
    "ids alone": lambda labels: "\n".join(labels.values()),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_label_file_gives_the_labels_of_the_class_folders(form, tree, flat, tmp_path):
    root, labels = flat
    (tmp_path / "labels").write_text(FORMS[form](labels))
    source, folder = open_images(root, labels=tmp_path / "labels"), list_images(tree)
    assert source.classes == WNIDS and source.files == [f"{name}.JPEG" for name in labels]
    by_content = {content(folder, i): label for i, label in enumerate(folder.labels)}
    assert [by_content[content(source, i)] for i in range(128)] == source.labels.tolist()


def test_numbers_count_in_the_list_that_is_given(flat, tmp_path):
    root, labels = flat
    places = list(imagenet_words())
    numbers = [places.index(wnid) for wnid in labels.values()]
    (tmp_path / "labels").write_text("".join(f"{name}.JPEG {n}\n" for name, n in zip(labels, numbers)))
    source = open_images(root, labels=tmp_path / "labels", classes="imagenet-1k")
    assert source.labels.tolist() == numbers and len(source.classes) == 1000
    with pytest.raises(UserError, match=r"labels are numbers.*--classes"):
        open_images(root, labels=tmp_path / "labels")


def test_a_label_that_is_a_name_and_another_classs_number_is_refused(flat, tmp_path):
    root, labels = flat
    twelve = sorted(map(str, range(1, 13)))  # as text: 1, 10, 11, 12, 2, ...
    (tmp_path / "classes").write_text("\n".join(twelve))

    def write(words):
        rows = [f"{name} {words[i % len(words)]}\n" for i, name in enumerate(labels)]
        (tmp_path / "labels").write_text("".join(rows))
        return open_images(root, labels=tmp_path / "labels", classes=tmp_path / "classes")

    for words in (["10", "1"], ["10", "0"], ["12", "10", "0"]):  # all are names, or one is none
        with pytest.raises(UserError, match=r"label 10 may be the class named '10', or .* number 10, .* named '8'"):
            write(words)
    assert set(write(["10", "12"]).labels) == {1, 3}  # 12 is no number of twelve classes, so both are names
    with pytest.raises(UserError, match="label 13 is neither the name of a class nor a number from 0 to 11"):
        write(["0", "13"])
    (tmp_path / "classes").write_text("100\n200")
    with pytest.raises(UserError, match="label 300 is neither the name of a class nor a number from 0 to 1"):
        write(["100", "200", "300"])
    with pytest.raises(UserError, match="label 100 is the name of a class and no number from 0 to 1, but label 1 is "):
        write(["100", "1"])
    (tmp_path / "classes").write_text("\n".join(map(str, range(10))))
    assert set(write(["3", "7"]).labels) == {3, 7}  # the same either way


KIT = {1: 490, 2: 361, 3: 171, 4: 822, 5: 297, 50000: 186}  # the first lines of the kit's file, and the last


@pytest.mark.parametrize("form", ["{label}", "ILSVRC2012_val_{number:08d}.JPEG {label}",
                                  "ILSVRC2012_val_{number:08d}.JPEG,{label}"])
def test_numbers_of_the_development_kit_are_refused(form, flat, tmp_path):
    picture = next(flat[0].iterdir())
    for number in KIT:
        (tmp_path / "val").mkdir(exist_ok=True)
        shutil.copy(picture, tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    (tmp_path / "labels").write_text("\n".join(form.format(number=n, label=label) for n, label in KIT.items()))
    with pytest.raises(UserError, match=r"development kit.*00000001 is 490.*LOC_val_solution\.csv"):
        open_images(tmp_path / "val", labels=tmp_path / "labels", classes="imagenet-1k")


def test_a_label_that_contradicts_the_class_folder_is_refused(tree, tmp_path):
    source = list_images(tree)
    rows = [f"{file} {source.classes[label]}" for file, label in zip(source.files, source.labels)]
    (tmp_path / "labels").write_text("\n".join(rows))
    assert np.array_equal(open_images(tree, labels=tmp_path / "labels").labels, source.labels)
    (tmp_path / "labels").write_text("\n".join([f"{source.files[0]} {source.classes[3]}", *rows[1:]]))
    with pytest.raises(UserError, match=f"gives class '{WNIDS[3]}' to .* in the folder of class '{WNIDS[0]}'"):
        open_images(tree, labels=tmp_path / "labels")


def one_changed(change):
    def text(labels):
        lines = [f"{name}.JPEG {wnid}" for name, wnid in labels.items()]
        return "\n".join(change(lines))
    return text


@pytest.mark.parametrize("text, message", [
    (one_changed(lambda lines: lines[:-2]), "2 of 128 images .* have no line .first: ILSVRC2012_val_00000127"),
    (one_changed(lambda lines: [*lines, "ILSVRC2012_val_00009999.JPEG n01440764"]), "line 129 names .*9999.*no such"),
    (one_changed(lambda lines: [*lines, lines[0]]), "line 129 names .*0001.* a second time"),
    (one_changed(lambda lines: [lines[0][:-1] + "x", *lines[1:]]), "class 'n.......x' is none of the 1000"),
    (one_changed(lambda lines: [*lines, "alone"]), "line 129 has 1 fields"),
    (one_changed(lambda lines: ["a,b,c"]), "line 1 has 3 fields"),
    (lambda labels: "n01440764\n" * 127, "127 labels for the 128 images"),
    (lambda labels: "1000\n" * 128, "label 1000 is neither .* a number from 0 to 999.*development kit"),
    (lambda labels: "\n", "empty"),
    (lambda labels: "9" * 5000 + "\n0" * 127, "label 9{20} is neither .* a number from 0 to 999"),
    (one_changed(lambda lines: ["ILSVRC2012_val_00000001.JPEG,"]), "line 1 has an empty name or label"),
    (one_changed(lambda lines: ["ILSVRC2012_val_00000001,n01440764 1 2 3 4 n01443537 1 2 3 4"] + [
        line.replace(" ", ",") for line in lines[1:]]), "line 1 names two classes"),
])
def test_a_label_file_that_does_not_fit_is_refused(text, message, flat, tmp_path):
    root, labels = flat
    (tmp_path / "labels").write_text(text(labels))
    with pytest.raises(UserError, match=message):
        open_images(root, labels=tmp_path / "labels", classes="imagenet-1k")


def test_a_flat_folder_without_labels_says_what_is_missing(flat, tmp_path):
    with pytest.raises(UserError, match=r"outside of the class folders.*--labels"):
        open_images(flat[0])
    with pytest.raises(UserError, match=r"labels\.txt: no such file"):
        open_images(flat[0], labels=tmp_path / "labels.txt")


def test_a_list_of_classes_numbers_a_part_as_the_whole(tree, tmp_path):
    whole = list(imagenet_words())
    source = open_images(tree, classes="imagenet-1k")
    assert [whole[label] for label in source.labels[::8]] == WNIDS
    assert source.class_names()[source.labels[-1]] == "banana"  # n07753592, the words of a person
    (tmp_path / "list.txt").write_text("".join(f"{wnid} {words}\n" for wnid, words in imagenet_words().items()))
    assert read_class_list(tmp_path / "list.txt") == whole
    assert read_class_list(tree) == WNIDS == open_images(tree).classes
    (tmp_path / "twice.txt").write_text("dog\ncat\ndog\n")
    for classes, message in ((tmp_path / "no", "no such file"), (tmp_path / "twice.txt", "'dog' is there twice")):
        with pytest.raises(UserError, match=message):
            read_class_list(classes)
    (tmp_path / "two.txt").write_text("n01440764\nn01443537\n")
    with pytest.raises(UserError, match="class 'n01484850' is none of the 2"):
        open_images(tree, classes=tmp_path / "two.txt")


def test_what_a_person_should_know_is_noted(tree, image_folder):
    assert ["16 of imagenet-1k's 1000 classes" in note for note in open_images(tree).notes()] == [True]
    assert open_images(tree, classes="imagenet-1k").notes() == ["984 of 1000 classes have no image"]
    folder = image_folder(classes=("a", "b"))
    assert list_images(folder).notes() == []
    (folder / "a" / "0000.png.tmp").write_text("")
    assert list_images(folder).notes() == ["1 files are no images by their name and are left out (first: "
                                           "a/0000.png.tmp)"]
    wordnet = image_folder("wordnet", classes=("n00000001", "n01440764"), each=1)
    assert "1 class folders are none of imagenet-1k's (first: n00000001)" in list_images(wordnet).notes()


def test_parquet_files_hold_the_images_of_the_folder(tree, tmp_path):
    folder = list_images(tree)
    source = open_images(write_shards(tmp_path / "data", folder))
    assert source.classes == WNIDS and np.array_equal(source.labels, folder.labels) and len(set(source.files)) == 128
    for index in np.random.default_rng(0).permutation(128):
        assert content(source, index) == content(folder, index)


def test_a_split_is_named_and_must_be_whole(tree, tmp_path):
    folder = list_images(tree)
    data = write_shards(tmp_path / "data", folder, names=[f"{words}" for words in list(imagenet_words().values())[:16]])
    write_shards(data, folder, split="validation", shards=1)
    source = open_images(data / "train")
    assert len(source) == 128 and source.class_names()[:2] == ["tench", "goldfish"]
    assert open_images(data / "validation").classes == WNIDS
    with pytest.raises(UserError, match="holds the splits train, validation"):
        open_images(data)
    with pytest.raises(UserError, match="leave --labels out"):
        open_images(data / "train", labels="labels.txt")
    (data / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match="2 Parquet files of train, but their names say 00003"):
        open_images(data / "train")


@pytest.mark.parametrize("written, classes, message", [
    ({"image": None, "pixels": [1] * 128}, None, "columns label int64, pixels int64; expected image struct"),
    ({"label": None}, None, "expected image struct<bytes, path> and label int64"),
    ({"names": []}, None, "metadata names no classes.*--classes"),
    ({"names": ["a", "b"]}, None, "label 15 is outside 0 to 1"),
    ({"label": [-1] * 128}, None, "label -1 is outside 0 to 15 .a split without labels"),
    ({}, "imagenet-1k", "has 16 classes, but --classes names 1000"),
])
def test_other_parquet_files_are_refused(written, classes, message, tree, tmp_path):
    data = write_shards(tmp_path / "data", list_images(tree), shards=1, **written)
    with pytest.raises(UserError, match=message):
        open_images(data, classes=classes)


ENGLISH = [words.split(",")[0].upper().replace(" ", "_") for words in list(imagenet_words().values())[:16]]


@pytest.mark.parametrize("names, classes, label", [
    (["a", "b", "c"], ["b", "a", "c"], 0), (["a", "b", "c"], ["a", "b", "x"], 2), (["a", "b"], ["A", "b "], None),
    (["0", "1", "2"], ["a", "b", "c"], None), (WNIDS, [*WNIDS[:14], WNIDS[15], WNIDS[14]], 14), (WNIDS, WNIDS, None),
    (["n02012849", "n03126707"], ["n03126707", "n02012849"], 0),  # two classes that are both called crane
    (ENGLISH, list(imagenet_words())[:16], None), ([*ENGLISH[:9], *ENGLISH[:8:-1]], list(imagenet_words())[:16], 9)])
def test_class_names_that_contradict_the_list_are_refused(names, classes, label, tree, tmp_path):
    source = list_images(tree)
    data = write_shards(tmp_path / "data", replace(source, labels=source.labels % len(names)), names=names)
    (tmp_path / "classes.txt").write_text("\n".join(classes))
    if label is None:
        assert open_images(data, classes=tmp_path / "classes.txt").classes == [name.strip() for name in classes]
        return
    with pytest.raises(UserError, match=rf"train-00000-.*: label {label} is '{names[label]}' in its metadata, but "
                                        rf"'{classes[label]}' in --classes"):
        open_images(data, classes=tmp_path / "classes.txt")


def test_a_wording_of_imagenets_names_that_is_new_in_few_classes_is_no_contradiction():
    names = [words.split(",")[0] for words in imagenet_words().values()]
    names[517], names[639] = "crane2", "maillot2"
    assert contradiction(names, list(imagenet_words())) is None
    names[3] = names[700]
    assert contradiction(names, list(imagenet_words())) == 3


def test_parquet_files_that_name_their_classes_differently_are_refused(tree, tmp_path):
    data = write_shards(tmp_path / "data", list_images(tree), shards=2)
    other = write_shards(tmp_path / "other", list_images(tree), shards=2, names=WNIDS[::-1])
    shutil.copy(other / "train-00001-of-00002.parquet", data)
    with pytest.raises(UserError, match=r"00001-of-00002.*names 16 classes, which differ from those of train-00000"):
        open_images(data)


def test_a_damaged_parquet_file_and_a_missing_pyarrow_are_named(tmp_path, monkeypatch):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet: not a readable Parquet file"):
        open_images(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'mutor_img\[parquet\]'"):
        open_images(tmp_path)


def write_tars_of(folder, source, *names):
    folder = write_tars(folder, source, lambda i: b"0", tars=len(names))
    for number, name in enumerate(names):
        (folder / f"train-{number:04d}.tar").rename(folder / name)
    return folder


SHARDS = [("imagenet-train-000", "imagenet-val-000", "val"), ("train_000", "validation-000", "validation"),
          ("Train.000", "x", "x"), ("train000", "valid000", "valid")]


@pytest.mark.parametrize("one, other, split", SHARDS)
@pytest.mark.parametrize("ending", [".tar", ".TAR", ".parquet"])
def test_shards_of_several_splits_are_never_one_set(one, other, split, ending, tree, tmp_path):
    source, data, options = list_images(tree), tmp_path / "data", {} if ending == ".parquet" else {"classes": tree}
    if ending == ".parquet":
        for number, name in enumerate((one, other)):
            write_shards(data, source, shards=2)
            (data / f"train-{number:05d}-of-00002.parquet").rename(data / f"{name}.parquet")
            [path.unlink() for path in data.glob("*-of-*")]
    else:
        write_tars_of(data, source, f"{one}{ending}", f"{other}{ending}")
    for read in (partial(open_images, **options), open_unlabelled):
        with pytest.raises(UserError, match=f"holds the splits train, {split} .*--split train"):
            read(data)
        found = read(data, split=split)
        assert len(found) == 64 and all(file.startswith(f"{other}{ending}") for file in found.files)
        assert read(data / split).files == found.files
        with pytest.raises(UserError, match=f"no split 'none' in it; .*{split}"):
            read(data, split="none")


def test_what_lies_beside_shards_is_never_left_out_without_a_word(tree, tmp_path):
    data = write_shards(tmp_path / "data", list_images(tree))
    (data / ".cache").mkdir()
    (data / "._train-00000-of-00003.parquet").touch()
    assert len(open_images(data)) == 128
    for name in ("a.png", "train-0.tar"):
        (data / name).touch()
        with pytest.raises(UserError, match=f"holds train-00000-of-00003.parquet and {name}"):
            open_images(data)
        (data / name).unlink()
    (data / "train-00000-of-00003.parquet").unlink()
    (data / "train-00000-of-00003.parquet").symlink_to("/gone")
    with pytest.raises(UserError, match=r"train-00000-of-00003\.parquet: a link to /gone, which cannot be reached"):
        open_images(data)


def test_a_copy_of_a_shard_is_not_read_as_one_more(tree, tmp_path):
    data = write_shards(tmp_path / "data", list_images(tree))
    shutil.copy(data / "train-00000-of-00003.parquet", data / "train-00000-of-00003 (1).parquet")
    with pytest.raises(UserError, match=r"00003 \(1\)\.parquet is not one of the numbered files train beside it"):
        open_images(data)


@pytest.mark.parametrize("classes, labels, message", [
    (b"caf\xe9\n", b"a", "classes.*: not a text file in UTF-8"), (b"a\n", b"caf\xe9", "labels.*: not a text file"),
    (b"a\n", b"x," + b"y" * 200_000, "labels.*: line 1 is not a line of a CSV file")])
def test_files_that_are_no_text_are_named(classes, labels, message, flat, tmp_path):
    (tmp_path / "classes").write_bytes(classes)
    (tmp_path / "labels").write_bytes(labels)
    with pytest.raises(UserError, match=message):
        open_images(flat[0], labels=tmp_path / "labels", classes=tmp_path / "classes")


def test_hidden_things_do_not_decide_the_layout(tree, flat, tmp_path):
    shutil.copytree(flat[0], tmp_path / "flat")
    tars = write_tars(tmp_path / "tars", list_images(tree), lambda i: b"0")
    for root in (tmp_path / "flat", tars):
        (root / ".ipynb_checkpoints").mkdir()
        (root / "__MACOSX").mkdir()
        (root / "._x.parquet").touch()
    assert len(open_unlabelled(tmp_path / "flat")) == len(open_images(tars, classes=tree)) == 128


def test_labels_that_do_not_matter_need_not_be_there(tree, tmp_path):
    folder = list_images(tree)
    tars = open_unlabelled(write_tars(tmp_path / "tars", folder, lambda i: None))
    shards = open_unlabelled(write_shards(tmp_path / "data", folder, label=None, names=[]))
    for source in (tars, shards):
        assert source.classes == ["images"] and [content(source, i) for i in (0, 99)] == [content(folder, i)
                                                                                          for i in (0, 99)]


def test_images_without_labels_may_lie_flat(tree, flat, tmp_path):
    source = open_unlabelled(flat[0])
    assert source.files == [f"{name}.JPEG" for name in flat[1]] and source.spread(4).tolist() == [0, 32, 64, 96]
    assert open_unlabelled(tree).files == list_images(tree).files
    for path, message in ((tmp_path, "no class folders"), (tmp_path / "no", "no such folder")):
        with pytest.raises(UserError, match=message):
            open_unlabelled(path)


@pytest.mark.parametrize("layout", ["folder", "tars", "parquet"])
def test_an_image_that_is_replaced_after_it_was_listed_is_named(layout, tree, tmp_path):
    folder = list_images(tree)
    where = {"folder": lambda: tree, "tars": lambda: write_tars(tmp_path / "tars", folder, lambda i: b"0"),
             "parquet": lambda: write_shards(tmp_path / "data", folder)}[layout]()
    source = open_images(where, classes=tree)
    source.read(0, "RGB")
    file = folder.path(1) if layout == "folder" else sorted(where.iterdir())[0]
    file.write_bytes(file.read_bytes() + b"\0")  # every reader would go on: what it needs is still there
    with pytest.raises(UserError, match=f"{file.name}: .*changed or replaced"):
        source.read(1 if layout == "folder" else 20, "RGB")
