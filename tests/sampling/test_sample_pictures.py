"""Grids, strips and the grids of training runs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import NAMES, sample, write_tokenizer

from mutor_img.common.errors import UserError
from mutor_img.decoding import cpu as decoder_module
from mutor_img.decoding.sampler import Sampler, SamplingSettings
from mutor_img.sampling import draw_training_grid, main, sample_images
from mutor_img.sampling.pictures import GREY
from tokenizer import load_tokenizer


def test_a_grid_has_a_row_for_each_class_and_the_same_images_as_python_gives(run_of, random_model, tmp_path):
    run, path = run_of(), tmp_path / "grid.png"
    assert main(["--checkpoint", run, "--classes", "2,cat", "--grid", str(path), "--num-samples", "5"]) == path
    picture = np.asarray(Image.open(path))
    images = sample_images(random_model((4, 4)), load_tokenizer(tmp_path / "tokenizer"),
                           torch.tensor([2, 2, 2, 0, 0, 0]), torch.arange(6), SamplingSettings())
    large = images.repeat(12, 1).repeat(12, 2)  # 8 pixels are shown at 96
    left = picture.shape[1] - (3 * 98 + 2)
    for index, image in enumerate(large):
        row, column = divmod(index, 3)
        y, x = 2 + 98 * row, left + 2 + 98 * column
        assert np.array_equal(picture[y:y + 96, x:x + 96], image)
    assert left > 20 and (picture[:, :left] < 128).any()  # the names


def test_a_grid_without_classes_shows_them_all_and_goes_with_an_npz(run_of, tmp_path, capsys):
    main(["--checkpoint", run_of(), "--grid", str(tmp_path / "g.png"), "--out", str(tmp_path / "s.npz"),
          "--num-samples", "10"])
    assert "3 classes, 8 images each" in capsys.readouterr().out and (tmp_path / "s.npz").exists()


def test_the_batch_size_cuts_a_grid_into_batches(run_of, tmp_path, monkeypatch):
    run, seen = run_of(), []
    real = Sampler.generate
    monkeypatch.setattr(Sampler, "generate", lambda self, labels, *rest: seen.append(len(labels)) or real(self, labels,
                                                                                                       *rest))
    for name, size in (("a", 64), ("b", 10)):
        main(["--checkpoint", run, "--grid", str(tmp_path / f"{name}.png"), "--batch-size", str(size)])
    assert seen == [24, 10, 10, 4] and (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_strip_shows_the_first_image_as_its_codes_arrive(run_of, tmp_path):
    run, path = run_of(), tmp_path / "strip.png"
    assert main(["--checkpoint", run, "--show-steps", str(path)]) == path
    picture = np.asarray(Image.open(path))
    final = np.load(sample(run, tmp_path / "s.npz", count=1))["arr_0"][0]
    final = final.repeat(12, 0).repeat(12, 1)  # 8 pixels are shown at 96
    left = picture.shape[1] - (8 * 98 + 2)
    frames = [picture[2:98, left + 2 + 98 * frame:left + 98 + 98 * frame] for frame in range(8)]
    assert np.array_equal(frames[7], final) and not np.array_equal(frames[6], final)
    for count, frame in zip(range(2, 18, 2), frames):  # 4 x 4 codes, two per frame, each a cell of 24 pixels
        grey = [(frame[y:y + 24, x:x + 24] == GREY).all() for y in range(0, 96, 24) for x in range(0, 96, 24)]
        assert grey == [False] * count + [True] * (16 - count)


@pytest.mark.parametrize("flags", [["--classes", "1"], ["--seed", "3"], ["--labels", "balanced", "--seed", "5"]],
                         ids=str)
def test_a_strip_is_of_the_first_image_of_the_same_flags(run_of, tmp_path, flags):
    run, path = run_of(), tmp_path / "strip.png"
    final = np.load(sample(run, tmp_path / "s.npz", "--show-steps", str(path), *flags, count=5))["arr_0"][0]
    assert np.array_equal(np.asarray(Image.open(path))[2:98, -98:-2], final.repeat(12, 0).repeat(12, 1))


def test_the_training_grid_needs_the_runs_metadata_alone(run_of, random_model, tmp_path):
    vq = write_tokenizer(tmp_path / "vq")
    codes = {"tokenizer": vq.path, "tokenizer_hash": vq.hash, "class_names": NAMES, "image_size": 8, "path": "codes"}
    pictures = SimpleNamespace(cfg_scale=2.0, per_class=2)
    draw_training_grid(random_model((4, 4)), codes, pictures, 0, tmp_path / "a.png")
    kept = len(decoder_module._PACKED)
    draw_training_grid(model := random_model((4, 4)).train(), codes, pictures, 0, tmp_path / "b.png")
    assert len(decoder_module._PACKED) == kept and model.training  # no second copy of the weights stays
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(UserError, match="sha256"):
        draw_training_grid(random_model((4, 4)), {**codes, "tokenizer_hash": "0" * 64}, pictures, 0, tmp_path / "c.png")
