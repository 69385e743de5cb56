"""What was lost, measured on real files."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from mutor_img.common.images import to_nhwc
from mutor_img.metrics import inception
from mutor_img.metrics.samples import open_samples
from tokenizer import load_tokenizer, scores
from tokenizer.images.crops import to_float
from tokenizer.images.folder import list_images
from tokenizer.measures import psnr, sharpness, ssim
from tokenizer.reconstruct import main, reconstruct_folder


def test_scores_are_those_of_decode_after_encode(tokenizer_run, image_folder, tmp_path, capsys):
    run, images = tokenizer_run(), image_folder()
    main(["--tokenizer", str(run), "--images", str(images), "--workers", "0", "--batch-size", "5",
          "--json", str(tmp_path / "scores.json"), "--out", str(tmp_path / "picture.png")])
    folder, vq = list_images(images), load_tokenizer(run)
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(folder.path(i)))) for i in range(12)])[:, None]
    codes = vq.encode(to_float(pixels))
    before, after = to_nhwc(to_float(pixels)), to_nhwc(vq.decode(codes))
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["psnr"] == pytest.approx(psnr(before, after)) and found["ssim"] == pytest.approx(ssim(before, after))
    assert found["codes_used"] == codes.unique().numel() / 16
    assert found["sharpness"] == pytest.approx(sharpness(after) / sharpness(before))
    assert found["num_images"] == 12 and found["tokenizer_hash"] == vq.hash
    assert f"PSNR         {found['psnr']:.2f} dB" in capsys.readouterr().out
    assert Image.open(tmp_path / "picture.png").height > 4 * 64  # 12 images: two pairs of rows, magnified


def test_reconstructions_are_written_for_scoring_with_their_labels(tokenizer_run, image_folder, tmp_path, refused):
    run, images, out = tokenizer_run(), image_folder(), tmp_path / "decoded"
    command = ["--tokenizer", str(run), "--images", str(images), "--workers", "0", "--batch-size", "5",
               "--num-images", "6", "--samples", str(out)]
    main(command)
    folder, vq, found = list_images(images), load_tokenizer(run), open_samples(out)
    numbers = folder.spread(6)
    assert found.labels.tolist() == folder.labels[numbers].tolist() and len(set(found.labels.tolist())) > 1
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(folder.path(i)))) for i in numbers])[:, None]
    assert (found.read(0, 6) == to_nhwc(vq.decode(vq.encode(to_float(pixels))))).all()
    assert "decoded exists; remove it" in refused(main, *command)


def test_reconstructions_of_flat_images_have_no_labels(tokenizer_run, image_folder, tmp_path):
    main(["--tokenizer", str(tokenizer_run()), "--images", str(image_folder() / "b"), "--workers", "0",
          "--samples", str(tmp_path / "decoded")])
    assert open_samples(tmp_path / "decoded").labels is None


def test_fewer_images_are_spread_over_the_classes(tokenizer_run, image_folder, tmp_path):
    main(["--tokenizer", str(tokenizer_run()), "--images", str(image_folder()), "--workers", "0", "--num-images", "3",
          "--json", str(tmp_path / "scores.json")])
    assert json.loads((tmp_path / "scores.json").read_text())["num_images"] == 3


def test_an_unreadable_image_is_refused(tokenizer_run, image_folder, refused):
    run, images = tokenizer_run(), image_folder()
    (images / "b" / "0002.png").write_bytes(b"no image")
    assert "0002.png: not a readable image" in refused(main, "--tokenizer", run, "--images", images, "--workers", 0)


class Colours:
    """A feature network that anybody can follow: each image's mean, deviation and corner."""

    name, weights_hash, warnings, dimensions = "colours", "00", (), {"pool": 3}

    def __call__(self, images):
        pixels = torch.as_tensor(images).double().flatten(1)  # (B, H * W * C)
        return {"pool": torch.stack([pixels.mean(1), pixels.std(1), pixels[:, 0]], 1).float()}


def test_rfid_is_the_frechet_distance_to_the_images_themselves(tokenizer_run, image_folder, monkeypatch, tmp_path,
                                                               capsys):
    monkeypatch.setattr(inception, "load_inception", lambda weights, device: Colours())
    monkeypatch.setattr(Colours, "warnings", ["weights of a stranger"])
    run, images = tokenizer_run(), image_folder()
    main(["--tokenizer", str(run), "--images", str(images), "--workers", "0", "--batch-size", "5",
          "--metrics", "psnr,rfid", "--json", str(tmp_path / "scores.json")])
    found = json.loads((tmp_path / "scores.json").read_text())
    assert "warning: weights of a stranger" in capsys.readouterr().err
    folder, vq = list_images(images), load_tokenizer(run)
    pixels = to_float(torch.stack([torch.from_numpy(np.array(Image.open(folder.path(i)))) for i in range(12)])[:, None])
    a, b = (Colours()(to_nhwc(x))["pool"].double().numpy() for x in (pixels, vq.decode(vq.encode(pixels))))
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert found["rfid"] == pytest.approx(expected, rel=1e-6) and found["rfid"] > 1
    assert found["rfid_reference"]["role"] == "reconstruction" and "ssim" not in found and "lpips" not in found


def test_lpips_is_the_mean_over_all_images(tokenizer_run, image_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(scores, "load_lpips", lambda folder, device: lambda a, b: (a - b).abs().mean((1, 2, 3)))
    run, images = tokenizer_run(), image_folder(size=16)
    found = reconstruct_folder(load_tokenizer(run), images, image_size=16, batch_size=5, metrics=["lpips"])
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(list_images(images).path(i)))) for i in range(12)])
    vq = load_tokenizer(run)
    before, after = to_nhwc(to_float(pixels[:, None])), to_nhwc(vq.decode(vq.encode(to_float(pixels[:, None]))))
    assert found["lpips"] == pytest.approx(np.abs(before / 127.5 - after / 127.5).mean(), rel=1e-5)


def test_metrics_without_weights_are_left_out_and_named_unless_asked_for(tokenizer_run, image_folder, monkeypatch,
                                                                         tmp_path, refused):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    command = ["--tokenizer", str(tokenizer_run()), "--images", str(image_folder(size=16)), "--image-size", "16",
               "--workers", "0"]
    main([*command, "--json", str(tmp_path / "scores.json")])
    found = json.loads((tmp_path / "scores.json").read_text())
    assert set(found["not_computed"]) == {"rfid", "lpips"} and "rfid" not in found and found["sharpness"] > 0
    assert "no Inception weights at" in found["not_computed"]["rfid"]
    assert "vgg16-397923af.pth is missing" in refused(main, *command, "--metrics", "lpips")
    assert f"{tmp_path}/x/vgg16-397923af.pth is missing" in refused(main, *command, "--lpips-weights", tmp_path / "x")
    assert "no such file" in refused(main, *command, "--inception-weights", tmp_path / "x")
    assert "'ssim'" in refused(main, *command, "--metrics", "sim")
    assert "leaves lpips out" in refused(main, *command, "--metrics", "ssim", "--lpips-weights", tmp_path / "x")


def test_images_smaller_than_ssims_windows_have_no_ssim(tokenizer_run, image_folder, tmp_path, refused):
    command = ["--tokenizer", str(tokenizer_run()), "--images", str(image_folder()), "--image-size", "4",
               "--workers", "0"]
    main([*command, "--json", str(tmp_path / "scores.json")])
    found = json.loads((tmp_path / "scores.json").read_text())
    assert "ssim" not in found and found["psnr"] > 0
    assert found["not_computed"]["ssim"] == "SSIM compares windows of 7 pixels per side, and images have 4"
    assert "SSIM compares windows" in refused(main, *command, "--metrics", "ssim")
    assert "--image-size is 0" in refused(main, *command, "--image-size", "0")


def test_one_of_several_splits_is_reconstructed(tokenizer_run, image_folder, tmp_path, refused):
    images = image_folder(classes=("x",))
    for number, path in enumerate(sorted((images / "x").iterdir())):
        path.rename(images / "x" / f"{'train' if number else 'val'}_{number}.png")
    command = ["--tokenizer", tokenizer_run(), "--images", images / "x", "--workers", 0]
    assert "holds the splits train, val" in refused(main, *command)
    main([*map(str, command), "--split", "train", "--json", str(tmp_path / "scores.json")])
    assert json.loads((tmp_path / "scores.json").read_text())["num_images"] == 3


def test_a_picture_that_is_no_png_is_refused_before_anything_is_read(tmp_path, refused):
    assert "a.gif: must end in .png" in refused(main, "--tokenizer", "missing", "--images", tmp_path, "--out", "a.gif")
