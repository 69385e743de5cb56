import json

import numpy as np
import pytest
import torch
from PIL import Image

from mutor_img.common.errors import UserError
from mutor_img.common.files import read_json
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


def write_images(root, side, colour, seed=0, count=100, channels="RGB"):
    """Write an ImageFolder of 2 classes that differ in brightness alone, or in colour alone."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 60, (side, side, 3), dtype=np.uint8)
        pixels[:] = pixels[..., :1]
        pixels[..., i % 2 if colour else slice(None)] += np.uint8(120 if colour or i % 2 else 0)
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert(channels).save(path)
    return FolderImages(root)


@pytest.mark.parametrize("side, colour", [(28, True), (16, False)])
def test_any_folder_of_small_images_has_its_classifier(tmp_path, side, colour):
    images, val = (write_images(tmp_path / str(seed), side, colour, seed) for seed in (0, 1))
    about = train(images, val, tmp_path / "out", epochs=12)
    assert (about["image_size"], about["channels"], about["accuracy"]) == (side, 3 if colour else 1, 1.0)
    network = load_digits(tmp_path / "out", name="classifier")
    logits = network(read_all(val))["logits"]
    assert network.name == "classifier" and (logits.argmax(1).numpy() == val.labels).all()
    turned = network(read_all(val)[..., ::-1].copy())["logits"]  # blue for red: other numbers where colours count
    assert torch.equal(turned, logits) != colour


def test_the_classifier_of_grey_images_is_the_same_to_the_byte_however_they_are_stored(tmp_path):
    val = write_images(tmp_path / "val", 32, False, 1)
    about = [train(write_images(tmp_path / mode, 32, False, channels=mode), val, tmp_path / f"{mode} out", epochs=1)
             for mode in ("L", "RGB")]
    assert about[0]["weights_sha256"] == about[1]["weights_sha256"] and about[0]["channels"] == 1


@pytest.mark.parametrize("sides, colours, message", [
    ((72, 72), (False, False), "72 x 72 pixels; the classifier takes square images of 8 to 64"),
    ((32, 28), (False, False), "28 x 28 pixels; this classifier takes 32 x 32"),
    ((32, 32), (False, True), "holds coloured images")])
def test_images_that_a_classifier_cannot_take_are_refused(tmp_path, sides, colours, message):
    folders = [write_images(tmp_path / str(i), side, colour) for i, (side, colour) in enumerate(zip(sides, colours))]
    with pytest.raises(UserError, match=message):
        train(*folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_classifier_from_before_colours_is_loaded_as_grey(trained, tmp_path):
    for name in (WEIGHTS_FILE, ABOUT_FILE):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    about = read_json(tmp_path / ABOUT_FILE)
    assert about.pop("channels") == 1
    (tmp_path / ABOUT_FILE).write_text(json.dumps(about))
    assert load_digits(tmp_path).net.channels == 1


@pytest.mark.parametrize("damage", ["weights", "missing", "names", "hash"])
def test_loading_is_strict(trained, tmp_path, damage):
    for name in (WEIGHTS_FILE, ABOUT_FILE):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    about = read_json(tmp_path / ABOUT_FILE)
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
