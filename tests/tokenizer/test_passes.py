"""How many images go through the network at a time on a GPU: as many as its memory holds, whatever is asked for."""

import math

import pytest
import torch
from fake_cuda import FakeCuda
from torch.nn.modules.module import register_module_forward_pre_hook

from tokenizer import load_tokenizer
from tokenizer.encode import main as encode
from tokenizer.network import interface as network
from tokenizer.network.layers import Decoder, Encoder
from tokenizer.reconstruct import reconstruct_folder

CHECKS = [f"tokenizer.network.interface.ImageTokenizer.{name}" for name in ("_check_images", "_check_codes")]


@pytest.fixture
def passes():
    """Images and pixels of each pass through encoders and decoders, by kind."""
    found = {Encoder: [], Decoder: []}

    def note(module, inputs):
        if type(module) in found:
            rows, _, height, width = inputs[0].shape
            scale = 1 if isinstance(module, Encoder) else 2  # the decoder reads the grid of codes of 2 x 2 pixels
            found[type(module)].append((rows, rows * height * width * scale**2))

    handle = register_module_forward_pre_hook(note)
    yield found
    handle.remove()


@pytest.mark.parametrize("rows, side", [(640, 256), (64, 384), (2000, 256), (3, 4096), (1, 256), (5000, 64)])
def test_no_pass_takes_more_pixels_than_64_images_of_256(tiny_vq, passes, rows, side):
    with FakeCuda(CHECKS):
        vq = tiny_vq(attention=False).to("cuda")
        decoded = vq.decode(vq.encode(torch.empty(rows, 1, side, side, device="cuda")))
    assert decoded.shape == (rows, 1, side, side)
    for seen in passes.values():
        assert sum(images for images, _ in seen) == rows
        assert all(pixels <= 64 * 256**2 or images == 1 for images, pixels in seen)
        assert len(seen) == math.ceil(rows / max(1, 64 * 256**2 // side**2))  # and not more passes than that takes


@pytest.mark.parametrize("crop, views", [
    (["--crop", "ten-crop"], 10), (["--crop", "random", "--num-views", "7"], 7), ([], 2)])
def test_encoding_keeps_to_it_with_any_crops_and_any_batch(tokenizer_run, image_folder, passes, tmp_path, monkeypatch,
                                                           crop, views):
    monkeypatch.setattr(network, "MOST_PIXELS", 5 * 8**2)
    with FakeCuda([CHECKS[0], "tokenizer.encode._encode"]):
        encode(["--tokenizer", str(tokenizer_run()), "--images", str(image_folder()), "--out", str(tmp_path / "codes"),
                "--workers", "0", "--batch-size", "4096", *crop])
    assert sum(images for images, _ in passes[Encoder]) == 12 * views
    assert max(images for images, _ in passes[Encoder]) == 5


def test_reconstruction_keeps_to_it(tokenizer_run, image_folder, passes, monkeypatch):
    monkeypatch.setattr(network, "MOST_PIXELS", 5 * 8**2)
    with FakeCuda([*CHECKS, "mutor_img.common.images.to_nhwc", "tokenizer.measures.CodeUse.add"]):
        reconstruct_folder(load_tokenizer(tokenizer_run(), "cuda"), image_folder(), batch_size=4096, metrics=["psnr"])
    assert [[images for images, _ in seen] for seen in passes.values()] == [[5, 5, 2], [5, 5, 2]]


def test_the_cap_changes_no_code(tiny_vq, monkeypatch):
    vq, images = tiny_vq(), torch.rand(20, 1, 8, 8) * 2 - 1
    rule = network.rows_at_once
    monkeypatch.setattr(network, "rows_at_once", lambda device, *size: rule(torch.device("cuda"), *size))
    codes, decoded = vq.encode(images), vq.decode(vq.encode(images))
    monkeypatch.setattr(network, "MOST_PIXELS", 3 * 8**2)
    assert torch.equal(vq.encode(images), codes) and codes.unique().numel() > 4
    torch.testing.assert_close(vq.decode(codes), decoded)
