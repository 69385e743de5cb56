"""What was lost, measured on real files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mutor_img.images import to_nhwc
from tokenizer import load_tokenizer
from tokenizer.crops import to_float
from tokenizer.folder import list_images
from tokenizer.measures import psnr, ssim
from tokenizer.reconstruct import main


def test_scores_are_those_of_decode_after_encode(tokenizer_run, image_folder, tmp_path, capsys):
    run, images = tokenizer_run(), image_folder()
    main(["--tokenizer", str(run), "--images", str(images), "--workers", "0", "--batch-size", "5",
          "--json", str(tmp_path / "scores.json"), "--out", str(tmp_path / "picture.png")])
    folder, vq = list_images(images), load_tokenizer(run)
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(folder.path(i)))) for i in range(12)])[:, None]
    codes = vq.encode(to_float(pixels))
    before, after = to_nhwc(to_float(pixels)), to_nhwc(vq.decode(codes))
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["psnr"] == pytest.approx(psnr(before, after)) and scores["ssim"] == pytest.approx(ssim(before, after))
    assert scores["codes_used"] == codes.unique().numel() / 16
    assert scores["num_images"] == 12 and scores["tokenizer_hash"] == vq.hash
    assert f"PSNR         {scores['psnr']:.2f} dB" in capsys.readouterr().out
    assert Image.open(tmp_path / "picture.png").height > 4 * 64  # 12 images: two pairs of rows, magnified


def test_fewer_images_are_spread_over_the_classes(tokenizer_run, image_folder, tmp_path):
    main(["--tokenizer", str(tokenizer_run()), "--images", str(image_folder()), "--workers", "0", "--num-images", "3",
          "--json", str(tmp_path / "scores.json")])
    assert json.loads((tmp_path / "scores.json").read_text())["num_images"] == 3


def test_an_unreadable_image_is_refused(tokenizer_run, image_folder, refused):
    run, images = tokenizer_run(), image_folder()
    (images / "b" / "0002.png").write_bytes(b"no image")
    assert "0002.png: not a readable image" in refused(main, "--tokenizer", run, "--images", images, "--workers", 0)
