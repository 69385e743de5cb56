import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from projection import Projection
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from mutor_img.common.errors import UserError
from mutor_img.metrics import evaluator
from mutor_img.metrics.digits import load_digits
from mutor_img.metrics.evaluator import evaluate, make_reference
from mutor_img.metrics.frechet import Statistics, frechet_distance
from mutor_img.metrics.image_sets import ArrayImages, FolderImages
from mutor_img.metrics.inception import load_inception
from mutor_img.metrics.inception_score import inception_score
from mutor_img.metrics.precision_recall import precision_recall
from mutor_img.metrics.references import as_reference, open_reference
from mutor_img.metrics.report import class_table
from mutor_img.metrics.samples import open_samples
from mutor_img.metrics.subsets import choose


def by_numpy(values):
    values = values.double().numpy()
    return Statistics(torch.from_numpy(values.mean(0)), torch.from_numpy(np.cov(values.T)))


@pytest.fixture
def reference(noise):
    return as_reference(ArrayImages(noise(50, 1), np.arange(50) % 4, name="train"), role="generation")


def test_all_scores_of_one_pass_are_those_of_the_single_metrics(network, noise, reference):
    result = evaluate(ArrayImages(noise(40)), reference, network)
    ours, theirs = network(noise(40)), network(noise(50, 1))
    for key, output in (("fd", "pool"), ("sfid", "spatial")):
        expected = frechet_distance(by_numpy(ours[output]), by_numpy(theirs[output]))
        assert result[key] == pytest.approx(expected, rel=1e-4)
    assert result["is"] == pytest.approx(inception_score(ours["logits"]), rel=1e-5)
    assert (result["precision"], result["recall"]) == precision_recall(ours["pool"], theirs["pool"])
    assert (result["num_samples"], result["comparable"], result["features"]) == (40, True, "projection")
    assert "fid" not in result
    json.dumps(result)


def test_only_inception_has_an_fid(noise, reference):
    result = evaluate(ArrayImages(noise(40)), reference, Projection(name="inception-v3-compat"), metrics=["fid"])
    assert "fid" in result
    assert not {"fd", "sfid", "is", "precision", "recall"} & set(result)


@pytest.mark.parametrize("batch_size", [7, 40])
def test_scores_do_not_depend_on_the_batch_size(batch_size, network, noise, reference):
    result = evaluate(ArrayImages(noise(40)), reference, network, batch_size=batch_size)
    assert result["fd"] == pytest.approx(evaluate(ArrayImages(noise(40)), reference, network)["fd"], rel=1e-6)


def test_statistics_in_the_file_win_over_its_images(tmp_path, network, noise):
    arrays = {"mu": np.zeros(6), "sigma": np.eye(6), "mu_s": np.ones(5), "sigma_s": np.eye(5)}
    np.savez(tmp_path / "adm.npz", arr_0=noise(50, 1), **arrays)
    result = evaluate(ArrayImages(noise(40)), open_reference(tmp_path / "adm.npz"), network)
    given = Statistics(torch.zeros(6), torch.eye(6))
    assert result["fd"] == pytest.approx(frechet_distance(by_numpy(network(noise(40))["pool"]), given), rel=1e-4)
    assert result["reference"]["statistics"] == "mu and sigma of the file"
    assert result["reference"]["precision_recall_images"] == 50
    assert result["comparable"]


def test_statistics_of_a_file_are_taken_over_into_a_made_reference(tmp_path, network, noise):
    arrays = {"mu": np.zeros(6), "sigma": np.eye(6), "mu_s": np.ones(5), "sigma_s": np.eye(5)}
    np.savez(tmp_path / "adm.npz", arr_0=noise(50, 1), **arrays)
    adm = open_reference(tmp_path / "adm.npz")
    make_reference(adm, network, "generation", tmp_path / "r.npz")
    direct, through = (evaluate(ArrayImages(noise(40)), r, network) for r in (adm, open_reference(tmp_path / "r.npz")))
    for key in ("fd", "sfid", "is", "precision", "recall"):
        assert through[key] == pytest.approx(direct[key], rel=1e-9)
    with pytest.raises(UserError, match="statistics of 6 features, the network projection has 7"):
        make_reference(adm, Projection(7), "generation", tmp_path / "other.npz")


def test_a_reference_of_images_says_that_it_was_computed(network, noise, reference):
    about = evaluate(ArrayImages(noise(40)), reference, network)["reference"]
    assert about["statistics"] == "computed from all 50 images"
    assert about["name"] == "train"


def test_a_made_reference_scores_like_its_images(tmp_path, network, noise, reference):
    make_reference(reference, network, "generation", tmp_path / "r.npz")
    made = open_reference(tmp_path / "r.npz")
    direct, through = (evaluate(ArrayImages(noise(40)), r, network) for r in (reference, made))
    for key in ("fd", "sfid", "is", "precision", "recall"):
        assert through[key] == pytest.approx(direct[key], rel=1e-9)
    with pytest.raises(UserError, match="made with"):
        evaluate(ArrayImages(noise(40)), made, Projection(name="other"))


def test_the_reference_is_extracted_once(network, noise, reference):
    evaluate(ArrayImages(noise(40)), reference, network)
    reference.images.images = None  # a second pass would fail
    assert evaluate(ArrayImages(noise(40)), reference, network)["num_samples"] == 40


@pytest.mark.parametrize("change, reason", [
    ({"samples": 5}, "fewer than the 6 features"),
    ({"role": None}, "does not declare"),
    ({"warning": "other weights"}, "other weights"),
])
def test_what_makes_scores_not_comparable_is_said(change, reason, noise):
    network = Projection()
    network.warnings = [change["warning"]] if "warning" in change else []
    reference = as_reference(ArrayImages(noise(50, 1)), role=change.get("role", "generation"))
    result = evaluate(ArrayImages(noise(change.get("samples", 40))), reference, network)
    assert result["comparable"] is False
    assert any(reason in warning for warning in result["warnings"])


def test_num_samples_draws_from_the_whole_set_and_never_takes_fewer(network, noise, reference):
    result = evaluate(ArrayImages(noise(40)), reference, network, num_samples=30)
    drawn = ArrayImages(noise(40)[choose(40, 30, seed=0)])
    assert result["fd"] == pytest.approx(evaluate(drawn, reference, network)["fd"], rel=1e-9)
    assert "30 of the 40 samples are scored, drawn from all of them by seed 0" in result["warnings"][0]
    assert (result["subset"], result["num_samples"], result["samples"]["held"]) == ("30 of 40, drawn by seed 0", 30, 40)
    with pytest.raises(UserError, match="41 are asked for"):
        evaluate(ArrayImages(noise(40)), reference, network, num_samples=41)


def test_the_whole_set_is_scored_as_it_always_was(network, noise, reference):
    plain, asked = (evaluate(ArrayImages(noise(40)), reference, network, num_samples=n) for n in (None, 40))
    assert plain | {"seconds": 0} == asked | {"seconds": 0} and plain["subset"] == "all" and not plain["warnings"]


def test_part_of_a_set_in_class_order_is_of_all_its_classes(tmp_path, network, noise, reference):
    """Each class of a shade of its own: its first images alone would lie far from the reference."""
    shades = np.repeat([0, 60, 120, 180], 50)
    images = (noise(200) // 8 + shades[:, None, None, None]).astype(np.uint8)
    real = as_reference(ArrayImages(images), role="generation")
    np.savez(tmp_path / "x.npz", arr_0=images, arr_1=shades // 60)
    for number, image in enumerate(images):
        path = tmp_path / "folder" / str(shades[number] // 60) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    scores = [evaluate(open_samples(tmp_path / name), real, network, metrics=["fid"], num_samples=50)["fd"]
              for name in ("x.npz", "folder")]
    first = evaluate(ArrayImages(images[:50]), real, network, metrics=["fid"])["fd"]
    assert scores[0] == scores[1] < first / 20


def test_class_order_in_file_order_is_warned_of(network, noise, reference):
    sorted_ = ArrayImages(noise(40), np.arange(40) // 10)
    result = evaluate(sorted_, reference, network, is_order="file")
    assert any("class order" in warning for warning in result["warnings"]) and result["comparable"] is False
    assert not evaluate(sorted_, reference, network)["warnings"]


def test_what_a_metric_lacks_is_an_error_only_when_it_is_asked_for(tmp_path, network, noise):
    np.savez(tmp_path / "clean.npz", mu=np.zeros(6), sigma=np.eye(6))
    reference = open_reference(tmp_path / "clean.npz")
    assert not {"sfid", "precision"} & set(evaluate(ArrayImages(noise(40)), reference, network))
    for metric in ("sfid", "pr"):
        with pytest.raises(UserError, match="cannot be computed"):
            evaluate(ArrayImages(noise(40)), reference, network, metrics=[metric])
    with pytest.raises(UserError, match="did you mean 'sfid'"):
        evaluate(ArrayImages(noise(40)), reference, network, metrics=["sfidd"])


@pytest.mark.parametrize("where", ["samples", "reference", "held-out images"])
def test_images_of_another_size_are_refused(where, tmp_path, network, noise, reference):
    small, sets = ArrayImages(noise(20)[:, :4]), {"samples": ArrayImages(noise(20)), "held-out images": None}
    if where == "reference":
        make_reference(reference, network, "generation", tmp_path / "r.npz")
        reference, sets["samples"] = open_reference(tmp_path / "r.npz"), small  # our file knows the size of its images
    else:
        sets[where] = small
    with pytest.raises(UserError, match="8 x 4 pixels"):
        evaluate(sets["samples"], reference, network, held_out=sets["held-out images"])


class Unread(ArrayImages):
    """Images that must not be read."""

    def read(self, start, stop):
        pytest.fail("was read")


def test_statistics_of_another_number_of_features_are_refused_before_the_samples_are_read(tmp_path, network, noise):
    np.savez(tmp_path / "clean.npz", mu=np.zeros(192), sigma=np.eye(192))
    with pytest.raises(UserError, match="statistics of 192 features, the network projection has 6"):
        evaluate(Unread(noise(9)), open_reference(tmp_path / "clean.npz"), network)


def test_statistics_without_a_network_that_look_like_inceptions_are_for_inception_alone(tmp_path, noise):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    other = Projection(2048)
    with pytest.raises(UserError, match=r"2048 features are taken for Inception's; .* with projection"):
        evaluate(Unread(noise(9)), open_reference(tmp_path / "adm.npz"), other, metrics=["fid"])


def test_a_reference_is_not_made_anew_for_the_other_role(network, reference, tmp_path):
    ours = replace(reference, role="generation")
    with pytest.raises(UserError, match="is a reference for generation; give --role generation"):
        make_reference(ours, network, "reconstruction", tmp_path / "r.npz")
    assert not (tmp_path / "r.npz").exists()


def test_a_large_reference_keeps_the_features_of_few_images(network, noise, reference, monkeypatch):
    monkeypatch.setattr(evaluator, "REFERENCE_ROWS", 20)
    result = evaluate(ArrayImages(noise(40)), reference, network)
    rows = network(noise(50, 1))["pool"]
    chosen = choose(50, 20, 0)
    assert (result["precision"], result["recall"]) == precision_recall(network(noise(40))["pool"], rows[chosen])
    assert result["reference"]["precision_recall_images"] == 20
    assert result["reference"]["statistics"] == "computed from all 50 images"


def test_held_out_images_and_samples_meet_at_one_number_of_one_mix(network, noise, reference):
    held_out = ArrayImages(noise(20, 2), np.arange(20) % 2, name="val")
    samples = ArrayImages(noise(40), [0] * 25 + [1] * 8 + [2] * 7)
    result = evaluate(samples, reference, network, held_out=held_out)
    assert result["num_samples"] == 40
    assert result["samples_at_same_n"]["num_samples"] == result["real_against_real"]["num_samples"] == 18
    assert result["real_against_real"]["name"] == "val"
    same = evaluate(ArrayImages(noise(50, 1)), reference, network, held_out=ArrayImages(noise(50, 1)))
    assert same["real_against_real"]["fd"] == pytest.approx(0, abs=1e-6)


def test_a_classifier_also_tells_recognised_distinct_and_copies(noise, reference):
    network = Projection()
    network.class_names = list("abcd")
    right = network(noise(40))["logits"].argmax(1).numpy()
    wrong = np.where(np.arange(40) < 10, (right + 1) % 4, right)
    result = evaluate(ArrayImages(noise(40), wrong), reference, network, held_out=ArrayImages(noise(20, 2)))
    assert result["recognised"] == 0.75
    assert result["distinct"] == 1.0
    assert result["nearer_than_held_out"] < 40
    copied = evaluate(ArrayImages(noise(50, 1)[:30]), reference, network, held_out=ArrayImages(noise(20, 2)))
    assert (copied["nearer_than_held_out"], copied["nearest_training_distance"]) == (30, 0.0)
    assert not {"recognised", "per_class"} & set(copied)  # no labels to compare with


def test_a_classifier_tells_per_class_what_it_recognises_and_what_is_in_pieces(noise, reference):
    network = Projection()
    network.class_names = list("abcd")
    images = noise(40) // 4  # of 8 x 8 pixels, none bright
    images[:5, 0, ::3] = 255  # three bright dots
    images[5:10, 0] = 255  # one line
    labels = np.arange(40) % 4
    result = evaluate(ArrayImages(images, labels), reference, network, held_out=ArrayImages(noise(20, 2), labels[:20]))
    guesses = network(images)["logits"].argmax(1).numpy()
    assert list(result["per_class"]) == list("abcd")
    for label, row in enumerate(result["per_class"].values()):
        assert row["num_samples"] == 10
        assert row["recognised"] == pytest.approx((guesses[labels == label] == label).mean())
        assert row["in_pieces"] == (labels[:5] == label).sum() / 10
    assert sum(row["num_samples"] for row in result["real_against_real"]["per_class"].values()) == 20
    two = evaluate(ArrayImages(images[:30], labels[:30] % 2), reference, network)
    assert list(two["per_class"]) == ["a", "b"]
    assert class_table({"samples": result, "other": {}})[1].split() == [
        "a", f"{result['per_class']['a']['recognised']:.1%}", "20.0%"]


class Images(torch.utils.data.Dataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, array):
        self.array = torch.from_numpy(array).permute(0, 3, 1, 2)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        return self.array[index]


def test_with_inception_all_scores_are_those_of_torch_fidelitys_own_calls(inception_file, coarse):
    samples, real = coarse(9, 3), coarse(8, 4)
    result = evaluate(ArrayImages(samples), as_reference(ArrayImages(real), role="generation"),
                      load_inception(inception_file), metrics=["fid", "sfid", "is", "pr", "kid"], is_order="file")
    layers = {"feature_layer_isc": "logits_unbiased", "feature_layer_kid": "2048", "feature_layer_prc": "2048"}
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(samples), input2=Images(real), isc=True, kid=True, prc=True, isc_splits=1, kid_subset_size=8,
        samples_shuffle=False, rng_seed=0, feature_extractor="inception-v3-compat", cuda=False, verbose=False,
        feature_extractor_weights_path=str(inception_file), cache=False, save_cpu_ram=True, batch_size=9, **layers)
    assert result["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert result["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)  # theirs: fp32 sums
    assert (result["precision"], result["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert 0 < result["precision"] < 1 and result["comparable"] is False
    # Their Frechet distance of 2048 features takes minutes: here the closed form for few images, of their features.
    extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_file))
    x, y = (extractor(Images(array).array)[0].double() for array in (samples, real))
    cx, cy = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    nuclear = torch.linalg.svdvals(cx @ cy.T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + cx.square().sum() + cy.square().sum() - 2 * nuclear
    assert result["fid"] == pytest.approx(expected.item(), rel=1e-5)
    assert result["sfid"] > 0


class Counted(ArrayImages):
    """Images that know how many of them were read."""

    read_so_far = 0

    def read(self, start, stop):
        self.read_so_far += stop - start
        return super().read(start, stop)


def test_a_second_evaluation_reads_no_image_of_the_reference(digit_folders, classifier, monkeypatch):
    read, network, reference = [], load_digits(classifier), open_reference(str(digit_folders["train"]))
    monkeypatch.setattr(reference.images, "read", lambda start, stop, real=reference.images.read: (
        read.append(start), real(start, stop))[1])
    first = evaluate(FolderImages(digit_folders["val"]), reference, network)
    seen = len(read)
    second = evaluate(FolderImages(digit_folders["val"]), reference, network)
    assert seen and len(read) == seen
    assert first["fd"] == second["fd"] and first["distinct"] == second["distinct"]


def test_precision_and_recall_look_at_no_more_of_the_reference_than_they_need(network, noise, monkeypatch):
    monkeypatch.setattr(evaluator, "REFERENCE_ROWS", 20)
    images = Counted(noise(50, 1), None)
    result = evaluate(ArrayImages(noise(40)), as_reference(images, role="generation"), network, metrics=["pr"])
    assert images.read_so_far == 20
    chosen = network(noise(50, 1)[choose(50, 20, 0).numpy()])["pool"]
    assert (result["precision"], result["recall"]) == precision_recall(network(noise(40))["pool"], chosen)
    assert result["reference"]["statistics"] == "none needed"
    assert not [line for line in result["warnings"] if "covariance" in line]  # 40 of 64: there is none


def test_damage_behind_the_images_that_are_drawn_is_found(network, noise, monkeypatch, tmp_path):
    """Zip tells of it at its end: the rest of a file is read, too."""
    monkeypatch.setattr(evaluator, "REFERENCE_ROWS", 20)
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=noise(600, 1))
    damaged = bytearray(path.read_bytes())
    damaged[2000] ^= 1  # in an image
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"reference\.npz"):
        evaluate(ArrayImages(noise(40)), open_reference(str(path)), network, metrics=["pr"])
    with pytest.raises(UserError, match=r"reference\.npz"):
        evaluate(open_samples(str(path)), as_reference(ArrayImages(noise(40)), role="generation"), network,
                 metrics=["fid"], num_samples=100)


def test_a_score_without_a_reference_claims_no_statistics_of_one(network, noise, reference):
    assert evaluate(ArrayImages(noise(40)), reference, network, metrics=["is"])["reference"]["statistics"] == (
        "none needed")
