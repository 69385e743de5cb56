"""Which classes samples are of: random and balanced labels, and classes by name and by number."""


import numpy as np
import pytest
import torch
from tiny_runs import NAMES, sample

from mutor_img.common.errors import UserError
from mutor_img.sampling.labels import class_words, make_labels, parse_classes, readable_names


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
