"""What a user gives the scoring command in error: one clear line on stderr, exit status 2, nothing written."""

import numpy as np
import pytest
import torch
from PIL import Image
from projection import Projection

from mutor_img.common import cli
from mutor_img.common.errors import UserError
from mutor_img.evaluation import command
from mutor_img.metrics import inception
from mutor_img.metrics.inception import INCEPTION_FILE
from mutor_img.metrics.requirements import INCEPTION

MU, SIGMA = np.zeros(6), np.eye(6)
STATISTICS = {"mu": MU, "sigma": SIGMA}


@pytest.fixture
def files(tmp_path, noise):
    """Good samples s.npz and every kind of bad file, by name."""
    def npz(name, **arrays):
        np.savez(tmp_path / name, **arrays)

    images = noise(20)
    npz("s.npz", arr_0=images)
    npz("float.npz", arr_0=images / 255)
    npz("nchw.npz", arr_0=images.transpose(0, 3, 1, 2))
    npz("large.npz", arr_0=images.repeat(2, 1).repeat(2, 2))
    npz("labels.npz", arr_0=images, arr_1=np.zeros(3, np.int64))
    npz("other.npz", pictures=images)
    npz("plain.npz", **STATISTICS)
    npz("half.npz", mu=MU)
    npz("nan.npz", mu=MU * np.nan, sigma=SIGMA)
    npz("wide.npz", mu=np.zeros(192), sigma=np.eye(192))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:-300])
    for name in ("jpegs", "mixed", "empty"):
        (tmp_path / name).mkdir()
    Image.fromarray(images[0]).save(tmp_path / "jpegs" / "0.jpg")
    for index, image in enumerate((images[0], images[0][:4])):
        Image.fromarray(image).save(tmp_path / "mixed" / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize(("samples", "reference", "more", "words"), [
    ("s.npz", "plain.npz", ["--metrics", "sfid"], "no spatial statistics (mu_s, sigma_s)"),
    ("s.npz", "plain.npz", ["--metrics", "pr"], "holds statistics only, no images"),
    ("s.npz", "plain.npz", ["--metrics", "kid"], "holds statistics only, no images"),
    ("s.npz", "half.npz", [], "mu and sigma belong together; one is missing"),
    ("s.npz", "nan.npz", [], "nan.npz: mu or sigma holds NaN or infinity"),
    ("s.npz", "wide.npz", [], "statistics of 192 features"),
    ("s.npz", "other.npz", [], "neither mu and sigma nor images"),
    ("s.npz", "cut.npz", [], "cut.npz: not a whole npz file"),
    ("s.npz", "jpegs", [], "lossy compression, as of JPEGs"),
    ("s.npz", "absent.npz", [], "no such reference"),
    ("s.npz", "large.npz", [], "samples are 8 x 8 pixels, the reference large.npz 16 x 16"),
    ("s.npz", "plain.npz", ["--num-samples", "21"], "holds 20 samples, 21 are asked for"),
    ("s.npz", "plain.npz", ["--held-out", "large.npz", "--reference", "s.npz"], "held-out images are 16 x 16"),
    ("cut.npz", "plain.npz", [], "cut.npz: not a whole npz file"),
    ("float.npz", "plain.npz", [], "is float64; images are uint8"),
    ("nchw.npz", "plain.npz", [], "has shape (20, 3, 8, 8)"),
    ("labels.npz", "plain.npz", [], "arr_1 is int64 of shape (3,)"),
    ("other.npz", "plain.npz", [], "no array arr_0 of images; it holds pictures"),
    ("jpegs", "plain.npz", [], "lossy compression, as of JPEGs"),
    ("mixed", "plain.npz", [], "1.png is 8 x 4 pixels, the first image 8 x 8"),
    ("empty", "plain.npz", [], "no PNG images"),
    ("absent", "plain.npz", [], "no such file or folder of samples"),
])
def test_a_bad_file_is_one_line_and_status_2(samples, reference, more, words, files, monkeypatch, capsys):
    def load_network(*arguments):
        if "--metrics" in more or {"wide.npz", "mixed"} & {samples, reference}:  # seen only with it, or in the pass
            return Projection(name=INCEPTION)
        raise UserError("no weights here, and nothing to download them from")

    monkeypatch.setattr(command, "load_network", load_network)
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit) as caught:
        cli.run(command.main, ["--samples", samples, "--reference", reference, "--json", "scores.json", *more])
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert words in lines[0]
    assert not (files / "scores.json").exists()


def test_a_reference_is_not_made_of_statistics_whatever_the_network(files, monkeypatch, refused):
    monkeypatch.delattr(command, "load_network")
    assert "holds no images" in refused(command.main, "--make-reference", files / "plain.npz", "--role", "generation",
                                        "--out", files / "out.npz")


@pytest.mark.parametrize("there", [False, True], ids=["offline without weights", "another file in their place"])
def test_the_published_weights_or_none(there, files, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(files / "hub"))
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", (files / "unreachable").as_uri())
    path = files / "hub" / "checkpoints" / INCEPTION_FILE
    if there:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"another file")
    with pytest.raises(SystemExit) as caught:
        cli.run(command.main, ["--samples", str(files / "s.npz"), "--reference", str(files / "plain.npz"),
                               "--device", "cpu"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and str(path) in lines[0]
    assert ("6726825d" if there else "cannot be downloaded") in lines[0]
    assert path.exists() == there
