import json

import numpy as np
import pytest
from PIL import Image

from mutor_img.common.errors import UserError
from mutor_img.metrics.image_sets import ArrayImages, read_all
from mutor_img.metrics.samples import class_sorted, label_rule, labels_hash, open_samples


def test_statistics_inside_a_sample_file_are_ignored_with_a_warning(tmp_path, noise):
    np.savez(tmp_path / "x.npz", arr_0=noise(4), mu=np.zeros(3))
    samples = open_samples(tmp_path / "x.npz")
    assert "mu" in samples.warnings[0]
    np.testing.assert_array_equal(read_all(samples), noise(4))


def test_the_label_rule_is_the_manifests_word(tmp_path, noise):
    np.savez(tmp_path / "x.npz", arr_0=noise(4), arr_1=np.array([0, 0, 1, 1]))
    (tmp_path / "x.json").write_text(json.dumps({"labels": "random"}))
    assert label_rule(open_samples(tmp_path / "x.npz"), 4) == "random"


@pytest.mark.parametrize("labels, rule", [([0, 1, 0, 1], "balanced"), ([0, 0, 0, 1], "unequal"), (None, None)])
def test_without_a_manifest_the_labels_tell(labels, rule, noise):
    found = label_rule(ArrayImages(noise(4), labels), 4)
    assert found is rule if rule is None else found.startswith(rule)


def test_class_order_is_seen():
    images = np.zeros((6, 8, 8, 3), np.uint8)
    assert class_sorted(ArrayImages(images, [0, 0, 1, 1, 2, 2]), 6)
    assert not class_sorted(ArrayImages(images, [0, 1, 0, 1, 2, 2]), 6)
    assert not class_sorted(ArrayImages(images, [3] * 6), 6)
    assert not class_sorted(ArrayImages(images), 6)


def test_a_missing_file_and_a_broken_manifest_are_refused(tmp_path, noise):
    with pytest.raises(UserError, match="no such file"):
        open_samples(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", arr_0=noise(4))
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        open_samples(tmp_path / "x.npz")


def test_a_folder_that_sample_py_wrote_tells_its_labels_and_how_they_were_made(tmp_path, noise):
    for number, image in enumerate(noise(3)):
        Image.fromarray(image).save(tmp_path / f"{number:06d}.png")
    assert open_samples(tmp_path).labels is None and open_samples(tmp_path).manifest is None
    (tmp_path / "labels.json").write_text("[2, 0, 1]")
    (tmp_path / "manifest.json").write_text(json.dumps({"labels": "random"}))
    samples = open_samples(tmp_path)
    assert samples.labels.tolist() == [2, 0, 1] and label_rule(samples, 3) == "random"
    for broken in ("[2, 0]", "[2, 0, 1.5]", "{}"):
        (tmp_path / "labels.json").write_text(broken)
        with pytest.raises(UserError, match=r"labels\.json: must be a list of one whole number"):
            open_samples(tmp_path)


def test_labels_that_contradict_the_class_folders_are_refused(tmp_path, noise):
    for number, image in enumerate(noise(3)):
        (tmp_path / f"{number % 2}").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"{number % 2}" / f"{number}.png")
    (tmp_path / "labels.json").write_text("[0, 0, 1]")
    assert open_samples(tmp_path).labels.tolist() == [0, 0, 1]
    (tmp_path / "labels.json").write_text("[0, 1, 1]")
    with pytest.raises(UserError, match=r"labels\.json: its labels differ from those of the class folders"):
        open_samples(tmp_path)


def test_a_label_that_is_damaged_is_found_by_the_manifest(tmp_path, noise):
    for number, image in enumerate(noise(3)):
        Image.fromarray(image).save(tmp_path / f"{number:06d}.png")
    (tmp_path / "labels.json").write_text("[2, 0, 1]")
    (tmp_path / "manifest.json").write_text(json.dumps({"labels_sha256": labels_hash(np.array([2, 0, 1]))}))
    assert open_samples(tmp_path).labels.tolist() == [2, 0, 1]
    (tmp_path / "labels.json").write_text("[2, 0, 0]")
    with pytest.raises(UserError, match=r"labels\.json: damaged, or changed by hand"):
        open_samples(tmp_path)


def test_the_manifest_of_other_samples_is_refused(tmp_path, noise):
    labels = np.array([2, 0, 1])
    np.savez(tmp_path / "s.npz", arr_0=noise(3), arr_1=labels)
    (tmp_path / "s.json").write_text(json.dumps({"labels_sha256": labels_hash(labels)}))
    assert open_samples(tmp_path / "s.npz").manifest
    for arrays in ({"arr_0": noise(3)}, {"arr_0": noise(3), "arr_1": labels[::-1]}):
        np.savez(tmp_path / "s.npz", **arrays)
        with pytest.raises(UserError, match=r"s\.json: is not of s\.npz"):
            open_samples(tmp_path / "s.npz")


def test_a_label_of_hundreds_of_digits_is_refused(tmp_path, noise):
    Image.fromarray(noise(1)[0]).save(tmp_path / "000000.png")
    (tmp_path / "labels.json").write_text(f"[{10**400}]")
    with pytest.raises(UserError, match=r"labels\.json: must be a list of one whole number"):
        open_samples(tmp_path)
