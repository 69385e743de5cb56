"""The network against a second one in float64, the released weights' names and sizes, and what it refuses."""

import numpy as np
import pytest
import reference_vq as reference
import torch
from einops import rearrange
from PIL import Image

from mutor_img.common.errors import UserError
from tokenizer.network.vq import VQModel, preset


@pytest.mark.parametrize("name, parameters, keys", [("vq16", 71_883_403, 344), ("vq8", 70_109_835, 300)])
def test_presets_have_the_size_of_the_released_weights(name, parameters, keys):
    with torch.device("meta"):
        vq = VQModel(**preset(name))
    assert sum(weight.numel() for weight in vq.parameters()) == parameters
    assert len(vq.state_dict()) == keys
    assert vq.state_dict()["quantize.codebook_used"].shape == (65536,)
    assert vq.grid_for(256) == {"vq16": (16, 16), "vq8": (32, 32)}[name]


def test_weight_names_are_those_of_the_released_vq16():
    block, attn = ("norm1", "conv1", "norm2", "conv2"), ("norm", "q", "k", "v", "proj_out")
    expected = {"quant_conv", "post_quant_conv"}
    for half, blocks, lowest in (("encoder", 2, 4), ("decoder", 3, 0)):
        expected |= {f"{half}.{name}" for name in ("conv_in", "norm_out", "conv_out")}
        expected |= {f"{half}.mid.{i}.{name}" for i in (0, 2) for name in block}
        expected |= {f"{half}.mid.1.{name}" for name in attn}
        expected |= {f"{half}.conv_blocks.{i}.res.{j}.{n}" for i in range(5) for j in range(blocks) for n in block}
        expected |= {f"{half}.conv_blocks.{lowest}.attn.{j}.{name}" for j in range(blocks) for name in attn}
    expected |= {f"encoder.conv_blocks.{i}.downsample.conv" for i in range(4)}
    expected |= {f"decoder.conv_blocks.{i}.upsample.conv" for i in range(4)}
    expected |= {f"encoder.conv_blocks.{i}.res.0.nin_shortcut" for i in (2, 4)}  # where the width changes
    expected |= {f"decoder.conv_blocks.{i}.res.0.nin_shortcut" for i in (1, 3)}
    names = {f"{name}.{kind}" for name in expected for kind in ("weight", "bias")}
    with torch.device("meta"):
        found = set(VQModel(**preset("vq16")).state_dict())
    assert found == names | {"quantize.embedding.weight", "quantize.codebook_used"}


def test_the_network_is_the_reference_network(tiny_vq):
    vq = tiny_vq(image_channels=3, multipliers=[1, 2, 4], blocks=2)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    weights = vq.state_dict()
    expected = reference.latents(weights, images, groups=2, levels=3)
    torch.testing.assert_close(vq.latents(images).double(), expected, rtol=1e-4, atol=1e-5)
    codes = torch.randint(16, (2, 16))
    expected = reference.pictures(weights, codes, side=4, groups=2, levels=3)
    torch.testing.assert_close(vq.decode(codes).double(), expected, rtol=1e-4, atol=1e-5)


def test_an_image_has_the_same_bytes_in_any_batch_and_on_any_number_of_threads(tiny_vq):
    vq = tiny_vq()
    images = torch.rand(70, 1, 8, 8) * 2 - 1
    codes = vq.encode(images)
    decoded = vq.decode(codes)
    assert codes.shape == (70, 16) and codes.dtype == torch.int64 and codes.unique().numel() > 4
    for part in (slice(0, 1), slice(69, 70), slice(5, 68)):
        assert torch.equal(vq.encode(images[part]), codes[part])
        assert torch.equal(vq.decode(codes[part]), decoded[part])
    torch.set_num_threads(2)
    try:
        assert torch.equal(vq.encode(images), codes) and torch.equal(vq.decode(codes), decoded)
    finally:
        torch.set_num_threads(1)


def test_encode_ignores_a_callers_autocast(tiny_vq):
    vq, images = tiny_vq(), torch.rand(4, 1, 8, 8) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        codes, decoded = vq.encode(images), vq.decode(vq.encode(images))
    assert torch.equal(codes, vq.encode(images)) and torch.equal(decoded, vq.decode(codes))
    assert decoded.dtype == torch.float32


def test_forward_and_encode_choose_the_same_codes(tiny_vq):
    vq, images = tiny_vq(), torch.rand(64, 1, 8, 8) * 2 - 1
    reconstruction, quantised = vq(images)
    assert torch.equal(quantised.indices, vq.encode(images))
    torch.testing.assert_close(reconstruction.clamp(-1, 1), vq.decode(quantised.indices), rtol=1e-4, atol=1e-5)


def test_grey_images_are_repeated_for_an_rgb_tokenizer(tiny_vq):
    vq, grey = tiny_vq(image_channels=3), torch.rand(2, 1, 8, 8)
    assert torch.equal(vq.encode(grey), vq.encode(grey.repeat(1, 3, 1, 1)))


def test_rgb_images_are_turned_grey_for_a_grey_tokenizer_as_pillow_does(tiny_vq):
    vq, rng = tiny_vq(), np.random.default_rng(0)
    colours = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    seen = vq._check_images(torch.from_numpy(colours).permute(2, 0, 1)[None] / 127.5 - 1)  # (1, 1, 8, 8)
    grey = torch.from_numpy(np.array(Image.fromarray(colours).convert("L"))) / 127.5 - 1
    assert (seen[0, 0] - grey).abs().max() <= 0.51 / 127.5  # Pillow rounds to whole levels
    same = torch.rand(2, 1, 8, 8)
    assert torch.equal(vq.encode(same.repeat(1, 3, 1, 1)), vq.encode(same))


def test_images_and_grids_need_not_be_square(tiny_vq):
    vq = tiny_vq()
    codes = vq.encode(torch.zeros(1, 1, 8, 12))
    assert codes.shape == (1, 24) and vq.decode(codes, (4, 6)).shape == (1, 1, 8, 12)


@pytest.mark.parametrize("images, words", [
    (torch.zeros(1, 2, 8, 8), "shape"), (torch.zeros(8, 8), "shape"),
    (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "uint8"), (torch.full((1, 1, 8, 8), 255.0), "255"),
    (torch.full((1, 1, 8, 8), float("nan")), "nan"), (torch.zeros(1, 1, 7, 8), "multiple of 2"),
])
def test_encode_refuses_what_is_no_image(tiny_vq, images, words):
    with pytest.raises(UserError, match=words):
        tiny_vq().encode(images)


@pytest.mark.parametrize("codes, words", [
    (torch.full((1, 16), 16), "vocabulary is 0 to 15"), (torch.full((1, 16), -1), "-1"),
    (torch.zeros(1, 15, dtype=torch.int64), "15 codes"), (torch.zeros(1, 16), "float32"),
    (torch.zeros(16, dtype=torch.int64), "shape"),
])
def test_decode_refuses_what_are_no_codes(tiny_vq, codes, words):
    with pytest.raises(UserError, match=words):
        tiny_vq().decode(codes)


@pytest.mark.parametrize("options, words", [
    ({"image_channels": 2}, "image_channels is 2"), ({"groups": 3}, "groups is 3"),
    ({"multipliers": []}, "multipliers"), ({"blocks": 0}, "blocks is 0"),
    ({"vocabulary": 2**24 + 1}, "give 2 to 16777216 codes"),
])
def test_a_network_that_cannot_be_is_refused(tiny_vq, options, words):
    with pytest.raises(UserError, match=words):
        tiny_vq(**options)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="'vq16'"):
        preset("vq-16")


def test_a_local_code_depends_on_its_own_square_of_pixels_alone(tiny_vq):
    vq = tiny_vq(local=True, attention=False, multipliers=[1, 2, 2])
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    expected = vq.latents(images)  # (2, code_dim, 8, 8)
    squares = rearrange(images, "b c (h p) (w q) -> (b h w) c p q", p=4, q=4)
    alone = rearrange(vq.latents(squares), "(b h w) d 1 1 -> b d h w", b=2, h=8)
    assert torch.allclose(alone, expected, atol=1e-5) and expected.std() > 0.01


def test_a_code_of_the_full_encoder_sees_its_neighbours(tiny_vq):
    vq = tiny_vq(attention=False, multipliers=[1, 2, 2])
    images = torch.rand(1, 1, 32, 32) * 2 - 1
    changed = images.clone()
    changed[..., 15, 15] *= -1
    moved = (vq.latents(images) - vq.latents(changed)).abs().amax(1)[0] > 1e-6  # (8, 8)
    assert moved[3, 3] and moved[4, 4]


def test_codes_and_pixels_are_made_in_full_precision(tiny_vq):
    vq, conv, seen = tiny_vq(), torch.backends.cudnn.conv, []
    before = conv.fp32_precision
    for layer in (vq.quant_conv, vq.post_quant_conv):
        layer.register_forward_hook(lambda *_: seen.append((conv.fp32_precision, torch.is_autocast_enabled("cpu"))))
    conv.fp32_precision = "tf32"  # torch's default on GPUs
    try:
        with torch.autocast("cpu", torch.bfloat16):
            vq.decode(vq.encode(torch.zeros(1, 1, 8, 8)))
        assert seen == [("ieee", False)] * 2 and conv.fp32_precision == "tf32"
    finally:
        conv.fp32_precision = before
