"""evaluate_fid.py --checkpoint: the scores of sample.py's file without the file."""

import numpy as np
import pytest

from mutor_img.common.errors import UserError
from mutor_img.evaluation.command import main
from mutor_img.sampling import main as sample

SCORES = ("fd", "is", "precision", "recall", "recognised", "distinct", "nearest_training_distance")


@pytest.fixture
def digits(digit_folders, classifier):
    return ["--reference", str(digit_folders["train"]), "--features", "mnist", "--features-weights", str(classifier),
            "--device", "cpu"]


@pytest.mark.parametrize("flags", [[], ["--cfg-scale", "3", "--seed", "5", "--labels", "balanced", "--top-k", "4"]])
def test_scores_are_those_of_the_file_that_sample_writes(flags, run, digits, tmp_path):
    out = sample(["--checkpoint", str(run), "--num-samples", "37", "--out", str(tmp_path / "s.npz"), *flags])
    stored = main(["--samples", str(out), *digits])
    direct = main(["--checkpoint", str(run), "--num-samples", "37", "--batch-size", "10", *flags, *digits])
    assert {key: stored[key] for key in SCORES} == pytest.approx({key: direct[key] for key in SCORES}, rel=1e-6)
    assert direct["num_samples"] == 37
    assert (stored["labels"], direct["labels"]) == (("balanced", "balanced") if flags else ("random", "random"))


def test_the_same_batches_give_the_same_bits(run, digits, tmp_path):
    out = sample(["--checkpoint", str(run), "--num-samples", "20", "--out", str(tmp_path / "s.npz")])
    stored, direct = (main([*one, *digits]) for one in (
        ["--samples", str(out)], ["--checkpoint", str(run), "--num-samples", "20"]))
    assert [stored[key] for key in SCORES] == [direct[key] for key in SCORES]


def test_nothing_is_written_and_the_result_says_what_made_the_images(run, digits, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    result = main(["--checkpoint", str(run), "--num-samples", "8", "--cfg-scale", "1.5", "--metrics", "fid", *digits])
    assert sorted(tmp_path.rglob("*")) == before
    manifest = result["samples"]["manifest"]
    assert (manifest["generated"], manifest["cfg_scale"], manifest["num_samples"]) == (True, 1.5, 8)
    assert len(manifest["weights_hash"]) == 64


def test_a_reference_of_another_size_is_refused_before_anything_is_made(run, classifier, tmp_path):
    np.savez(tmp_path / "r.npz", arr_0=np.zeros((20, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match=r"samples are 32 x 32 pixels, the reference r\.npz 16 x 16"):
        main(["--checkpoint", str(run), "--reference", str(tmp_path / "r.npz"), "--features", "mnist",
              "--features-weights", str(classifier)])
