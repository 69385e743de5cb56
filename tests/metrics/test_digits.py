import json

import numpy as np
import pytest
import torch

from mutor_img.common.errors import UserError
from mutor_img.metrics.digits import ABOUT_FILE, WEIGHTS_FILE, DigitNet, load_digits, main, train
from mutor_img.metrics.image_sets import FolderImages, read_all


@pytest.fixture(scope="module")
def trained(digit_folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("classifier")
    about = main(["--images", str(digit_folders["train"]), "--val", str(digit_folders["val"]), "--out", str(out),
                  "--epochs", "12"])
    return out, about


def test_it_learns_and_says_how_well(trained):
    assert trained[1]["accuracy"] > 0.9
    assert trained[1]["class_names"] == ["0", "1", "2"]
    assert trained[1]["val_images"] == 18


def test_loaded_features_and_logits_are_those_of_the_saved_net(trained, digit_folders):
    network, val = load_digits(trained[0]), FolderImages(digit_folders["val"])
    outputs = network(read_all(val))
    assert network.dimensions == {"pool": 64, "logits": 3}
    assert {name: values.shape[1] for name, values in outputs.items()} == network.dimensions
    accuracy = (outputs["logits"].argmax(1).numpy() == val.labels).mean()
    assert accuracy == pytest.approx(trained[1]["accuracy"])


def test_training_is_a_function_of_the_seed(digit_folders, tmp_path):
    folders = [FolderImages(digit_folders[name]) for name in ("train", "val")]
    hashes = [train(*folders, tmp_path / str(i), seed=seed, epochs=1)["weights_sha256"]
              for i, seed in enumerate((0, 0, 1))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_finished_output_is_reused_and_another_recipe_refused(trained, digit_folders):
    folders = [FolderImages(digit_folders[name]) for name in ("train", "val")]
    written = (trained[0] / WEIGHTS_FILE).stat().st_mtime_ns
    assert train(*folders, trained[0], epochs=12) == trained[1]
    assert (trained[0] / WEIGHTS_FILE).stat().st_mtime_ns == written
    with pytest.raises(UserError, match="another"):
        train(*folders, trained[0], epochs=12, seed=1)


def test_grey_and_rgb_are_one_image(trained):
    network = load_digits(trained[0])
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), dtype=np.uint8)
    torch.testing.assert_close(network(image)["pool"], network(image.repeat(3, 3))["pool"])


@pytest.mark.parametrize("damage", ["weights", "missing", "names", "hash"])
def test_loading_is_strict(trained, tmp_path, damage):
    for name in (WEIGHTS_FILE, ABOUT_FILE):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    about = json.loads((tmp_path / ABOUT_FILE).read_text())
    if damage == "weights":
        (tmp_path / WEIGHTS_FILE).write_bytes(b"nonsense")
    if damage == "missing":
        (tmp_path / WEIGHTS_FILE).unlink()
    if damage == "names":
        (tmp_path / ABOUT_FILE).write_text(json.dumps(about | {"class_names": ["a", "b"]}))
    if damage == "hash":
        del about["weights_sha256"]
        (tmp_path / ABOUT_FILE).write_text(json.dumps(about))
    with pytest.raises(UserError):
        load_digits(tmp_path)


def test_an_empty_folder_names_the_command_that_trains(tmp_path):
    with pytest.raises(UserError, match=r"mutor_img\.metrics\.digits"):
        load_digits(tmp_path)


def test_images_of_another_size_are_refused(trained):
    with pytest.raises(UserError, match="28 x 28"):
        load_digits(trained[0])(np.zeros((1, 28, 28, 1), np.uint8))


def test_the_network_has_as_many_features_as_a_thousand_samples_can_bear():
    features, logits = DigitNet(10)(torch.zeros(2, 1, 32, 32))
    assert features.shape == (2, 64)
    assert logits.shape == (2, 10)
