"""The data order has no state and visits every image once per epoch; code stores are checked, and mixed evenly."""

import json
import os

import numpy as np
import pytest
import torch

from mutor_img.common.config import load_config
from mutor_img.common.errors import UserError
from mutor_img.data import store as codes_module
from mutor_img.data.order import StatelessOrder, TrainingCodes
from mutor_img.data.store import Codes, block_checksum
from mutor_img.pretraining.config import GeneratorConfig


def test_an_epoch_visits_every_item_once():
    items = StatelessOrder(37, seed=3).items(np.arange(74))
    assert sorted(items[:37]) == sorted(items[37:]) == list(range(37))


def test_an_epoch_is_shuffled():
    items = StatelessOrder(1000, seed=3).items(np.arange(1000))
    assert np.isin(np.diff(items) % 1000, (1, 999)).mean() < 0.02  # neighbours remain neighbours by chance: 0.2 %
    assert abs(np.corrcoef(np.arange(1000), items)[0, 1]) < 0.15


def test_epochs_and_seeds_have_different_orders():
    order = StatelessOrder(100, seed=0)
    first, second = order.items(np.arange(100)), order.items(np.arange(100, 200))
    assert (first != second).any() and (first != StatelessOrder(100, seed=1).items(np.arange(100))).any()


def test_items_depend_on_the_sample_number_alone():
    whole = StatelessOrder(11, seed=5).items(np.arange(60))
    order = StatelessOrder(11, seed=5)
    numbers = np.random.default_rng(0).permutation(60)
    assert all(order.items(np.array([n]))[0] == whole[n] for n in numbers)


def stores(make_codes, tmp_path, *seeds, **options):
    return [Codes(make_codes(tmp_path / f"store{seed}", seed=seed, images=12, **options)) for seed in seeds]


def test_a_sample_is_one_view_of_its_image_in_one_of_the_stores(make_codes, tmp_path):
    both = stores(make_codes, tmp_path, 0, 1)
    data = TrainingCodes(both, seed=2)
    images = data.order.items(np.arange(1200))
    codes, labels = data.batch(np.arange(1200))
    assert all(sorted(images[e * 12: (e + 1) * 12]) == list(range(12)) for e in range(100))  # once per epoch
    assert labels.tolist() == [i % 3 for i in images]
    taken = np.zeros((2, 2), int)  # by store and view
    for row, image in zip(codes.numpy(), images):
        found = [(s, v) for s in range(2) for v in range(2) if np.array_equal(both[s].codes[image, v], row)]
        assert len(found) == 1
        taken[found[0]] += 1
    assert (abs(taken - 300) < 75).all()  # 300 each, with a deviation of 15


def test_mixed_samples_do_not_depend_on_their_batch(make_codes, tmp_path):
    data = TrainingCodes(stores(make_codes, tmp_path, 0, 1, 2), seed=0)
    whole, _ = data.batch(np.arange(50))
    for part in (np.array([7]), np.array([49, 3, 12])):
        assert np.array_equal(data.batch(part)[0], whole[part])


def test_stores_with_other_numbers_of_views_mix(make_codes, tmp_path):
    two, one = Codes(make_codes(tmp_path / "two")), Codes(make_codes(tmp_path / "one", seed=1, views=1))
    images = (data := TrainingCodes([two, one], seed=0)).order.items(np.arange(400))
    from_one = (data.batch(np.arange(400))[0].numpy() == one.codes[images, 0]).all(1)
    assert 150 < from_one.sum() < 250  # half: stores are drawn evenly, not views


@pytest.mark.parametrize("change, message", [
    ({"tokenizer_hash": "b" * 64}, "tokenizer bbbbbbbbbbbb and by tokenizer aaaaaaaaaaaa"),
    ({"images": 11}, "they hold 11 and 10 images; give stores of the same images"),
    ({"vocabulary": 17}, "their vocabulary is 17 and 16; encode one"),
    ({"grid": (5, 4)}, r"grid is \(5, 4\) and \(4, 5\)"),
    ({"class_names": ["a", "b"]}, "number of classes is 2 and 3"),
    ({"class_names": ["a", "c", "b"]}, "class 1 is 'c' in the first and 'b' in the second"),
    ({"class_names": ["a", "b", "C"]}, "class 2 is 'C' in the first and 'c' in the second"),
    ({"images_hash": "x"}, "other images"),
])
def test_stores_that_do_not_fit_each_other_are_refused(change, message, make_codes, tmp_path):
    made = {key: change.pop(key) for key in list(change) if key in ("tokenizer_hash", "images")}
    first, other = Codes(make_codes(tmp_path / "a")), Codes(make_codes(tmp_path / "b", **made))
    first.info.images_hash = "y"
    for name, value in change.items():
        setattr(other.info, name, value)
    with pytest.raises(UserError, match=message):
        TrainingCodes([first, other], seed=0)


@pytest.mark.parametrize("names, message", [
    (["b", "a", "c"], "class 0 is 'b' in the first and 'a' in the second"), (["a", "b", "d"], "class 2 is 'd'"),
])
def test_held_out_codes_of_other_classes_are_refused(run_training, make_codes, tmp_path, names, message):
    held_out = make_codes(tmp_path / "held_out", seed=1)
    info = json.loads((held_out / "codes.json").read_text())
    (held_out / "codes.json").write_text(json.dumps({**info, "class_names": names}))
    with pytest.raises(UserError, match=message):
        run_training(f"data.val_codes={held_out}", "train.steps=1")
    with pytest.raises(UserError, match="tokenizer bbbbbbbbbbbb and by tokenizer aaaaaaaaaaaa"):
        run_training(f"data.val_codes={make_codes(tmp_path / 'other', tokenizer_hash='b' * 64)}", "train.steps=1")
    assert not (tmp_path / "runs").exists()


def test_a_start_from_other_classes_is_said(run_training, make_codes, tmp_path, capsys):
    run_training("train.steps=1")
    other = make_codes(tmp_path / "other")
    info = json.loads((other / "codes.json").read_text())
    for names, said in ((["a", "x", "c"], True), (["a", "b", "c"], False)):
        (other / "codes.json").write_text(json.dumps({**info, "class_names": names}))
        run_training(f"data.codes={other}", "data.val_codes=null", f"init_from={tmp_path}/runs/run",
                     f"run_dir={tmp_path}/{said}", "train.steps=1")
        assert ("class 1 is 'b' in init_from" in capsys.readouterr().err) == said


def test_a_start_from_codes_of_another_tokenizer_is_said_and_a_resume_reads_it_no_more(run_training, make_codes,
                                                                                      tmp_path, capsys):
    first = run_training("train.steps=1").run_dir
    flags = (f"data.codes={make_codes(tmp_path / 'other', tokenizer_hash='b' * 64)}", "data.val_codes=null",
             f"init_from={first}", f"run_dir={tmp_path}/start")
    run_training(*flags, "train.steps=1")
    assert f"tokenizer with sha256 {'a' * 16}, and those of data.codes are of one with {'b' * 16}" in (
        capsys.readouterr().err)
    first.rename(tmp_path / "away")
    assert run_training(*flags, "train.steps=2").step == 2 and "note:" not in capsys.readouterr().err


def test_a_start_from_another_number_of_classes_draws_their_table_anew_and_nothing_else(run_training, make_codes,
                                                                                       tmp_path, capsys):
    first = run_training("train.steps=1").model.state_dict()
    other = make_codes(tmp_path / "other")
    info = json.loads((other / "codes.json").read_text())
    (other / "codes.json").write_text(json.dumps({**info, "class_names": ["boot", "b", "c", "bag"]}))
    flags = (f"data.codes={other}", "data.val_codes=null", "model.classes=4", "optim.lr=1e-30", "train.steps=1")
    fresh = run_training(f"run_dir={tmp_path}/fresh", *flags).model.state_dict()
    start = run_training(f"run_dir={tmp_path}/start", f"init_from={tmp_path}/runs/run", *flags).model.state_dict()
    said = capsys.readouterr().err
    assert said.count("note:") == 1
    assert "runs/run has 3 classes, and data.codes 4: all class embeddings start at random" in said
    for name, weight in start.items():
        expected = (fresh if name.startswith("cls_embedding") else first)[name]
        assert torch.allclose(weight, expected, rtol=0, atol=1e-20), name


def test_a_run_over_several_stores_names_them_all(run_training, make_codes, codes_folder, tmp_path):
    other = make_codes(tmp_path / "other", seed=1)
    trainer = run_training(f"data.codes={codes_folder},{other}", "train.steps=1")
    assert [store["path"] for store in trainer.task.metadata()["codes"]["stores"]] == [str(codes_folder), str(other)]
    listed = run_training(f"data.codes=[{codes_folder},{other}]", f"run_dir={tmp_path / 'listed'}", "train.steps=1")
    assert [store.folder for store in listed.task.data.stores] == [codes_folder, other]


@pytest.mark.parametrize("value", ["[]", "a,,b", "[a,[b]]", "[a,null]", "{a: b}", "null"])
def test_codes_that_are_no_folders_are_refused(value, run_file):
    with pytest.raises(UserError, match=r"data\.codes is .*; give the folder"):
        load_config(GeneratorConfig, run_file, [f"data.codes={value}"])


def test_a_damaged_block_stops_a_run_before_it_begins(run_training, make_codes, tmp_path, monkeypatch):
    monkeypatch.setattr(codes_module, "BLOCK", 4)
    folder = make_codes(tmp_path / "blocks", block=4)  # 10 images: 3 blocks
    array = np.load(folder / "codes.npy", mmap_mode="r+")
    array[9, 1, 3] ^= 1
    array.flush()
    with pytest.raises(UserError, match=r"block 2 \(images 8 to 9\) does not match its checksum"):
        run_training(f"data.codes={folder}")
    assert not (tmp_path / "runs").exists()
    codes = Codes(folder)  # processes share the blocks, and a sum is what one would have found
    shares = [codes.faults(range(rank, codes.blocks, 2)) for rank in range(2)]
    assert sum(shares).tolist() == [0, 0, codes_module.Fault.CHECKSUM]


@pytest.mark.parametrize("where, value, message", [("codes", 16, "code outside of the vocabulary of 16"),
                                                   ("labels", 3, "label outside of 0 to 2")])
def test_values_out_of_range_are_found_under_a_right_checksum(where, value, message, make_codes, tmp_path):
    codes = Codes(make_codes(tmp_path / "codes"))
    changed = getattr(codes, where).copy()
    changed[7] = value
    setattr(codes, where, changed)
    codes.info.checksums = [block_checksum(codes.codes, codes.labels)]
    with pytest.raises(UserError, match=message):
        codes.verify()


@pytest.mark.parametrize("name", ["codes.npy", "labels.npy"])
def test_a_store_that_is_cut_off_while_it_is_read_ends_no_process(name, make_codes, tmp_path):
    codes = Codes(make_codes(tmp_path / "codes"))
    first = codes.batch(np.arange(3), np.zeros(3, np.int64))
    os.truncate(codes.folder / name, 0)  # reading the mapped file would now be a bus error
    with pytest.raises(UserError, match=rf"{name}: was changed or replaced"):
        codes.batch(np.arange(3), np.zeros(3, np.int64))
    assert len(first[1]) == 3
