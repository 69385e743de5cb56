import json

import numpy as np
import pytest

from mutor_img.common import cli
from mutor_img.common.errors import UserError
from mutor_img.common.files import read_json
from mutor_img.evaluation.command import main
from mutor_img.metrics import inception
from mutor_img.metrics.image_sets import FolderImages, read_all
from mutor_img.metrics.report import table


@pytest.fixture
def samples(digit_folders, tmp_path):
    train = FolderImages(digit_folders["train"])
    order = np.random.default_rng(0).permutation(60)[:40]
    np.savez(tmp_path / "samples.npz", arr_0=read_all(train)[order], arr_1=train.labels[order])
    (tmp_path / "samples.json").write_text('{"labels": "random", "seed": 0}')
    return tmp_path / "samples.npz"


def digits(samples, folders, classifier, *more):
    return ["--samples", str(samples), "--reference", str(folders["train"]), "--features", "mnist",
            "--features-weights", str(classifier), "--device", "cpu", *map(str, more)]


def test_digits_are_scored_to_a_table_and_a_file(samples, digit_folders, classifier, tmp_path, capsys):
    result = main(digits(samples, digit_folders, classifier, "--held-out", digit_folders["val"],
                         "--json", tmp_path / "scores.json"))
    assert read_json(tmp_path / "scores.json") == result
    assert {"fd", "is", "precision", "recall", "recognised", "distinct", "nearer_than_held_out"} <= set(result)
    assert (result["labels"], result["features"], result["nearer_than_held_out"]) == ("random", "mnist", 40)
    printed = capsys.readouterr()
    assert "held-out real" in printed.out
    assert "warning: the reference train does not declare its role" in printed.err


def test_a_made_reference_declares_its_role_and_the_other_is_refused(samples, digit_folders, classifier, tmp_path):
    made = tmp_path / "made.npz"
    main(["--make-reference", str(digit_folders["train"]), "--role", "reconstruction", "--out", str(made),
          "--features", "mnist", "--features-weights", str(classifier)])
    arguments = digits(samples, {"train": made}, classifier)
    with pytest.raises(UserError, match="--force-role"):
        main(arguments)
    assert main([*arguments, "--role", "reconstruction"])["reference"]["role"] == "reconstruction"
    assert not main([*arguments, "--force-role"])["comparable"]


def test_the_folder_above_the_splits_is_refused_unless_one_is_named(samples, digit_folders, classifier, tmp_path):
    above = digit_folders["train"].parent
    for role, path in (("--reference", above), ("--held-out", above), ("--samples", above)):
        with pytest.raises(UserError, match="holds the splits train, val"):
            main([*digits(samples, digit_folders, classifier), role, str(path)])
    arguments = digits(samples, {"train": above}, classifier, "--metrics", "fid")
    assert main([*arguments, "--split", "train"])["fd"] == main(digits(samples, digit_folders, classifier))["fd"]
    for more, message in ((["--split", "test"], "no split 'test' in it; .*train, val"),
                          (["--split", "train", "--reference", str(samples)], "is not a folder and has no splits")):
        with pytest.raises(UserError, match=message):
            main([*arguments, *more])


@pytest.mark.parametrize("names, doubt", [
    (["0", "1", "2"], None), (["0", "2", "1"], "class 1 is '2' in the samples and '1' in the reference"),
    (["0", "1"], "the samples have 2 classes and the reference 3"),
])
def test_labels_of_other_classes_are_doubted(samples, digit_folders, classifier, names, doubt):
    samples.with_suffix(".json").write_text(json.dumps({"labels": "random", "class_names": names}))
    warnings = main(digits(samples, digit_folders, classifier, "--metrics", "fid"))["warnings"]
    assert any(doubt in line for line in warnings) if doubt else not any("class" in line[:6] for line in warnings)


@pytest.mark.parametrize("count, name", [(50_000, "FID-50k"), (1000, "FID-1k"), (1234, "FID-1234")])
def test_only_fifty_thousand_samples_make_an_fid_50k(count, name):
    result = {"fid": 2.0, "num_samples": count, "features": "inception-v3-compat", "weights_sha256": "0" * 64,
              "labels": None, "comparable": True, "reference": {"name": "r", "role": None, "statistics": "s"}}
    assert table(result).splitlines()[1].split() == [name, "2.0000"]
    assert ("FID-50k" in table(result)) == (count == 50_000)


@pytest.mark.parametrize("arguments, message", [
    ([], "--samples is missing"),
    (["--samples", "x.npz", "--checkpoint", "run", "--reference", "y.npz"], "exclude each other"),
    (["--samples", "x.npz", "--reference", "y.npz", "--cfg-scale", "1.5"], "--cfg-scale has no use without"),
    (["--samples", "x.npz", "--reference", "y.npz", "--num-samples", "1"], "--num-samples is 1"),
    (["--checkpoint", "run", "--reference", "y.npz", "--labels", "even"], "--labels"),
    (["--samples", "x.npz", "--reference", "y.npz", "--features", "timm:test_vit"], "needs --features-weights"),
    (["--samples", "x.npz"], "--reference is missing"),
    (["--samples", "x.npz", "--reference", "y.npz", "--metrics", "fid,sfdi"], "did you mean 'sfid'"),
    (["--samples", "x.npz", "--reference", "y.npz", "--metrics", ","], "--metrics is ','; give names"),
    (["--samples", "x.npz", "--reference", "y.npz", "--features", "minst"], "did you mean 'mnist'"),
    (["--samples", "x.npz", "--reference", "y.npz", "--is-order", "shufle"], "did you mean 'shuffle'"),
    (["--samples", "x.npz", "--reference", "y.npz", "--role", "generate"], "did you mean 'generation'"),
    (["--sample", "x.npz"], "did you mean '--samples'"),
    (["--samples", "x.npz", "--reference", "y.npz", "--batch-size", "0"], "--batch-size is 0"),
    (["--samples", "x.npz", "--reference", "y.npz", "--device", "abacus"], "is not a device"),
    (["--samples", "x.npz", "--reference", "y.npz", "--device", "cuda:99"], "no such device"),
    (["--samples", "x.npz", "--reference", "y.npz", "--out", "z.npz"], "--out is for --make-reference"),
    (["--samples", "x.npz", "--reference", "y.npz", "--features-weights", "z"], "--features-weights is for"),
    (["--samples", "x.npz", "--reference", "y.npz", "--features", "mnist", "--inception-weights", "z"], "no use with"),
    (["--make-reference", "x", "--out", "z.npz"], "needs --role"),
    (["--make-reference", "x", "--role", "generation", "--out", "z.npz", "--json", "s.json"], "--json has no use"),
    (["--make-reference", "x", "--role", "generation", "--out", "z.npz", "--is-order", "file"],
     "--is-order has no use"),
    (["--samples", "x.npz", "--reference", "y.npz", "--json", "."], ".: a folder; give the name of a file"),
])
def test_a_mistake_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(main, arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("more, message", [
    (["--num-samples", "41"], "holds 40 samples, 41 are asked for"),
    (["--metrics", "sfid"], "no spatial features"),
])
def test_what_the_files_cannot_give_is_one_line_too(more, message, samples, digit_folders, classifier, capsys):
    with pytest.raises(SystemExit):
        cli.run(main, digits(samples, digit_folders, classifier, *more))
    assert message in capsys.readouterr().err


def test_inception_is_the_default_network(monkeypatch, tmp_path, noise):
    class AskedFor(Exception):
        pass

    def load(path, device):
        raise AskedFor(path)

    np.savez(tmp_path / "x.npz", arr_0=noise(9))
    samples = ["--samples", str(tmp_path / "x.npz"), "--reference", str(tmp_path / "x.npz"), "--device", "cpu"]
    with pytest.raises(UserError, match=r"absent\.pth: no such file"):
        main([*samples, "--inception-weights", "absent.pth"])
    monkeypatch.setattr(inception, "load_inception", load)
    with pytest.raises(AskedFor, match="mine"):
        main([*samples, "--inception-weights", "mine.pth"])
