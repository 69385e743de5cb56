"""Which names tell splits, and which only look like it."""

from pathlib import Path

import pytest

from mutor_img.common.errors import UserError
from mutor_img.common.splits import choose, folder_splits, shard_splits, split_word, splits_told


@pytest.mark.parametrize("name, word", [
    ("imagenet-train-000", "train"), ("train_000", "train"), ("VAL-7", "val"), ("imagenet1k-valid-00", "valid"),
    ("x.validation.3", "validation"), ("testA", "test"), ("imagenetTrain000", "train"), ("train2017", "train"),
    ("00000-test", "test"),
    ("train-00000-of-00002-6b4c0d5e8fabcdef", "train"), ("training_set", "training"), ("shard_dev_3", "dev"),
    ("valley", None), ("trainer", None), ("contest", None), ("n01440764_10026", None), ("000017", None)])
def test_a_split_is_a_word_of_its_own(name, word):
    assert split_word(name) == word


@pytest.mark.parametrize("names, splits", [
    (["imagenet-train-000", "imagenet-train-001", "imagenet-val-000"], {"train": [0, 1], "val": [2]}),
    (["train_000", "validation-000"], {"train": [0], "validation": [1]}),
    (["train", "test"], {"train": [0], "test": [1]}),
    (["train-000", "extra-000"], {"train": [0], "extra": [1]}),  # the one without a word is no part of the other
    (["a-00000-of-00001", "b-00000-of-00001"], {"a": [0], "b": [1]}),  # as Hugging Face numbers its splits
    (["a-train-0", "b-train-0"], {"train": [0, 1]}),
    (["cats-000", "dogs-000"], {}), (["000", "001"], {})])
def test_shards_of_several_splits_are_told_apart(names, splits):
    assert shard_splits(names) == splits


@pytest.mark.parametrize("names, splits", [
    (["train", "val"], ["train", "val"]), (["Train", "VAL", "labels"], ["train", "val"]), (["train"], ["train"]),
    (["imagenet-train", "imagenet-val"], ["train", "val"]), (["trainA", "trainB", "testA", "testB"], ["test", "train"]),
    (["train", "plane"], []), (["bullet_train", "test_tube"], []), (["valley", "coast"], []), ([], [])])
def test_folders_are_splits_where_they_differ_in_that_word_alone(names, splits):
    assert sorted(folder_splits(names)) == splits


def test_images_are_of_several_splits_where_their_names_differ_in_that_word_alone():
    names = ["COCO_train2014_000000000009", "COCO_val2014_000000000042", "x", "COCO_val2014_000000000073"]
    assert splits_told(names) == {"train": [0], "val": [1, 3]}
    assert splits_told(["train_0001", "unit_test_0001", "ILSVRC2012_val_00000001"]) == {}


def test_one_split_of_several_has_to_be_named():
    names, told = ["train-0.tar", "val-0.tar"], {"train": [0], "val": [1]}
    assert choose(Path("d"), names, told, "val") == [1] and choose(Path("d"), names, {}, None) == [0, 1]
    for split, splits, message in ((None, told, r"d: holds the splits train, val .*d/train, .*--split train"),
                                   ("vla", told, "no split 'vla' in it; did you mean 'val'.*train, val"),
                                   ("val", {}, "no split 'val' in it; no names in it tell splits")):
        with pytest.raises(UserError, match=message):
            choose(Path("d"), names, splits, split)
