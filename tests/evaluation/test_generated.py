"""evaluate_fid.py --checkpoint: the scores of sample.py's file without the file."""

import numpy as np
import pytest
import torch

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


def test_images_are_shrunk_as_sample_shrinks_them(run, digits, random_model, tmp_path, classifier):
    """A 12 x 12 grid of 48-pixel images, whose file says so, against a reference of 32 pixels."""
    weights = random_model((12, 12), heads=1, register_offsets=None).state_dict()
    torch.save({**weights, "freqs_cis": torch.zeros(145, 16, 2)}, tmp_path / "c2i.pt")
    flags = ["--checkpoint", str(tmp_path / "c2i.pt"), "--tokenizer", str(tmp_path / "vq"), "--num-samples", "12"]
    with pytest.raises(UserError, match="samples are 48 x 48 pixels, the reference train 32 x 32"):
        main([*flags, *digits])
    direct = main([*flags, "--resize", "32", *digits])
    assert direct["samples"]["manifest"]["grid"] == [12, 12] and direct["samples"]["resize"] == 32
    stored = main(["--samples", str(sample([*flags, "--resize", "32", "--out", str(tmp_path / "s.npz")])), *digits])
    assert [stored[key] for key in SCORES] == [direct[key] for key in SCORES]
    large = sample([*flags, "--out", str(tmp_path / "large.npz")])
    shrunk = main(["--samples", str(large), "--resize", "32", *digits])
    assert shrunk["samples"]["resize"] == 32 and shrunk["fd"] == pytest.approx(direct["fd"], rel=0.05)


def test_nothing_is_written_and_the_result_says_what_made_the_images(run, digits, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    result = main(["--checkpoint", str(run), "--num-samples", "8", "--cfg-scale", "1.5", "--metrics", "fid", *digits])
    assert sorted(tmp_path.rglob("*")) == before
    manifest = result["samples"]["manifest"]
    assert (manifest["generated"], manifest["cfg_scale"], manifest["num_samples"]) == (True, 1.5, 8)
    assert len(manifest["weights_hash"]) == 64
    drafted = main(["--checkpoint", str(run), "--num-samples", "8", "--cfg-scale", "1.5", "--metrics", "fid",
                    "--draft", "4", *digits])
    assert drafted["fd"] == result["fd"] and drafted["samples"]["manifest"]["draft"] == 4 and manifest["draft"] == 0


def test_a_reference_of_another_size_is_refused_before_anything_is_made(run, classifier, tmp_path):
    np.savez(tmp_path / "r.npz", arr_0=np.zeros((20, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match=r"samples are 32 x 32 pixels, the reference r\.npz 16 x 16"):
        main(["--checkpoint", str(run), "--reference", str(tmp_path / "r.npz"), "--features", "mnist",
              "--features-weights", str(classifier)])
