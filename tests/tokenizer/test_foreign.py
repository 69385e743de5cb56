"""Tokenizers of taming-transformers and MaskGIT: their names, their arithmetic, and the trip into a checkpoint."""

import sys
from types import ModuleType

import pytest
import reference_foreign as reference
import torch

from mutor_img.checkpoints.llamagen import read_pt
from mutor_img.common.errors import UserError
from mutor_img.convert import main as convert
from tokenizer import load_tokenizer
from tokenizer.encode import main as encode
from tokenizer.foreign import file_names
from tokenizer.inspect import main as inspect
from tokenizer.network.maskgit import MaskGITModel
from tokenizer.network.vq import VQModel


def convolution(name, outputs, inputs, kernel=3, bias=True):
    weights = {f"{name}.weight": torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5}
    return {**weights, f"{name}.bias": torch.randn(outputs) / 4} if bias else weights


def norm(name, width):
    return {f"{name}.weight": 1 + torch.randn(width) / 4, f"{name}.bias": torch.randn(width) / 4}


def residual(name, inputs, outputs, maskgit=False):
    shortcut = outputs if maskgit else inputs
    found = {**norm(f"{name}.norm1", inputs), **convolution(f"{name}.conv1", outputs, inputs, bias=not maskgit),
             **norm(f"{name}.norm2", outputs), **convolution(f"{name}.conv2", outputs, outputs, bias=not maskgit)}
    if inputs != outputs:
        found |= convolution(f"{name}.nin_shortcut", outputs, shortcut, 1, bias=not maskgit)
    return found


def attended(name, width):
    parts = [convolution(f"{name}.{part}", width, width, 1) for part in ("q", "k", "v", "proj_out")]
    return norm(f"{name}.norm", width) | {key: weight for part in parts for key, weight in part.items()}


def taming_file(widths=(32, 32, 64), blocks=1, latent=8, dim=4, vocabulary=32):
    """Weights under the names of taming-transformers, and as in its files those of a discriminator."""
    last = len(widths) - 1
    w = convolution("encoder.conv_in", widths[0], 3) | convolution("decoder.conv_in", widths[-1], latent)
    for half in ("encoder", "decoder"):
        for block in ("block_1", "block_2"):
            w |= residual(f"{half}.mid.{block}", widths[-1], widths[-1])
        w |= attended(f"{half}.mid.attn_1", widths[-1])
    width = widths[0]
    for level, wide in enumerate(widths):
        for j in range(blocks):
            w |= residual(f"encoder.down.{level}.block.{j}", width, wide)
            width = wide
            if level == last:
                w |= attended(f"encoder.down.{level}.attn.{j}", wide)
        if level != last:
            w |= convolution(f"encoder.down.{level}.downsample.conv", wide, wide)
    for level, wide in reversed(list(enumerate(widths))):
        for j in range(blocks + 1):
            w |= residual(f"decoder.up.{level}.block.{j}", width, wide)
            width = wide
            if level == last:
                w |= attended(f"decoder.up.{level}.attn.{j}", wide)
        if level:
            w |= convolution(f"decoder.up.{level}.upsample.conv", wide, wide)
    w |= norm("encoder.norm_out", widths[-1]) | convolution("encoder.conv_out", latent, widths[-1])
    w |= norm("decoder.norm_out", widths[0]) | convolution("decoder.conv_out", 3, widths[0])
    w |= convolution("quant_conv", dim, latent, 1) | convolution("post_quant_conv", latent, dim, 1)
    return w | {"quantize.embedding.weight": torch.randn(vocabulary, dim), "loss.discriminator.main.0.weight":
                torch.zeros(2), "loss.logvar": torch.zeros(())}


def maskgit_file(widths=(32, 32, 64), blocks=2, dim=4, vocabulary=32):
    """Weights under the names of MaskGIT's tokenizer in PyTorch."""
    w = convolution("encoder.conv_in", widths[0], 3, bias=False) | convolution("decoder.conv_in", widths[-1], dim)
    for half in ("encoder", "decoder"):
        for j in range(blocks):
            w |= residual(f"{half}.mid.{j}", widths[-1], widths[-1], True)
    width = widths[0]
    for level, wide in enumerate(widths):
        for j in range(blocks):
            w |= residual(f"encoder.down.{level}.block.{j}", width, wide, True)
            width = wide
    for level, wide in reversed(list(enumerate(widths))):
        for j in range(blocks):
            w |= residual(f"decoder.up.{level}.block.{j}", width, wide, True)
            width = wide
        if level:
            w |= convolution(f"decoder.up.{level}.upsample_conv", wide, wide)
    w |= norm("encoder.norm_out", widths[-1]) | convolution("encoder.conv_out", dim, widths[-1], 1)
    w |= norm("decoder.norm_out", widths[0]) | convolution("decoder.conv_out", 3, widths[0])
    return w | {"quantize.embedding.weight": torch.randn(vocabulary, dim)}


FAMILIES = [(taming_file, reference.taming_latents, reference.taming_pictures, lambda w: {"state_dict": w}),
            (maskgit_file, reference.maskgit_latents, reference.maskgit_pictures, lambda w: w)]
NAMES = ["taming", "maskgit"]


@pytest.fixture
def released(tmp_path):
    """A factory of (path, weights) of a file with drawn weights."""
    def build(draw, wrap=lambda w: w, **sizes):
        torch.manual_seed(0)
        weights = draw(**sizes)
        torch.save(wrap(weights), tmp_path / "vq.ckpt")
        return tmp_path / "vq.ckpt", weights

    return build


@pytest.mark.parametrize("draw, latents, pictures, wrap", FAMILIES, ids=NAMES)
def test_codes_and_pixels_are_those_of_the_reference_network(released, draw, latents, pictures, wrap):
    path, weights = released(draw, wrap)
    vq, images = load_tokenizer(path), torch.rand(3, 3, 16, 24) * 2 - 1
    expected = latents(weights, images)
    torch.testing.assert_close(vq.latents(images).double(), expected, rtol=1e-4, atol=1e-4)
    codes, rows = reference.nearest(weights, expected)
    assert torch.equal(vq.encode(images), codes) and codes.unique().numel() > 8
    torch.testing.assert_close(vq.decode(codes, (4, 6)).double(), pictures(weights, rows), rtol=1e-4, atol=1e-4)
    assert (vq.vocabulary, vq.stride, vq.image_size) == (32, 4, 256)
    assert torch.equal(vq.codebook, weights["quantize.embedding.weight"])


@pytest.mark.parametrize("draw, latents, pictures, wrap", FAMILIES, ids=NAMES)
def test_a_file_becomes_a_checkpoint_and_again_the_same_file(released, tmp_path, draw, latents, pictures, wrap):
    path, weights = released(draw, wrap)
    convert(["--source", str(path), "--out", str(tmp_path / "run")])
    convert(["--source", str(tmp_path / "run"), "--out", str(tmp_path / "back.pt")])
    back, images = torch.load(tmp_path / "back.pt", weights_only=True), torch.rand(2, 3, 16, 16) * 2 - 1
    kept = {name: weight for name, weight in weights.items() if not name.startswith("loss.")}
    assert back.keys() == wrap(kept).keys()
    assert all(torch.equal(read_pt(tmp_path / "back.pt")[name], weight) for name, weight in kept.items())
    ours, theirs = load_tokenizer(tmp_path / "run"), load_tokenizer(path)
    assert torch.equal(ours.encode(images), theirs.encode(images)) and ours.image_size == 256


@pytest.mark.parametrize("draw", [taming_file, maskgit_file], ids=NAMES)
def test_a_foreign_tokenizer_encodes_a_store_and_shows_it(released, image_folder, tmp_path, draw, capsys):
    path, _ = released(draw)
    encode(["--tokenizer", str(path), "--images", str(image_folder()), "--out", str(tmp_path / "codes"), "--workers",
            "0", "--image-size", "8"])
    inspect(["--codes", str(tmp_path / "codes"), "--out", str(tmp_path / "grid.png"), "--verify"])
    assert "2 x 2 of a vocabulary of 32" in capsys.readouterr().out


@pytest.mark.parametrize("model, options, draw, keys", [
    (VQModel, {"code_dim": 256, "vocabulary": 1024, "unit_codes": False}, taming_file, 343),
    (VQModel, {"code_dim": 256, "vocabulary": 16384, "unit_codes": False}, taming_file, 343),
    (MaskGITModel, {}, maskgit_file, 168)], ids=["taming 1024", "taming 16384", "maskgit"])
def test_the_released_sizes_have_the_released_names(model, options, draw, keys):
    with torch.device("meta"):
        vq = model(**options)
        sizes = {"latent": 256} if draw is taming_file else {}
        weights = draw(widths=(128, 128, 256, 256, 512), blocks=2, dim=256, vocabulary=vq.vocabulary, **sizes)
    expected = {name: weight.shape for name, weight in weights.items() if not name.startswith("loss.")}
    own = vq.state_dict()
    assert {theirs: own[name].shape for name, theirs in file_names(vq.options, own).items()} == expected
    assert vq.grid_for(256) == (16, 16) and len(expected) == keys


@pytest.mark.parametrize("draw, change, words", [
    (taming_file, lambda w: w.pop("decoder.up.2.attn.1.q.bias"), "weight 'decoder.up.2.attn.1.q.bias' is missing"),
    (taming_file, lambda w: w.update(extra=torch.zeros(1)), "unknown weight 'extra'"),
    (taming_file, lambda w: w.update({"quant_conv.bias": torch.zeros(5)}), "weight 'quant_conv.bias' has shape (5,)"),
    (taming_file, lambda w: w.pop("encoder.conv_in.weight"), "weights of no known tokenizer"),
    (taming_file, lambda w: w.update({"quantize.proj.weight": torch.zeros(1)}), "a Gumbel VQGAN"),
    (taming_file, lambda w: w.update({"quantize.quant_resi.0.weight": torch.zeros(1)}), "VAR's"),
    (maskgit_file, lambda w: w.update({"loss.logvar": torch.zeros(1)}), "unknown weight 'loss.logvar'"),
    (maskgit_file, lambda w: w.pop("decoder.up.1.upsample_conv.bias"), "upsample_conv.bias' is missing"),
    (maskgit_file, lambda w: w.update({"quantize.embedding.weight": torch.zeros(4)}), "no known tokenizer"),
    (maskgit_file, lambda w: w.update(latent_tokens=torch.zeros(32, 4)), "TiTok's"),
])
def test_what_does_not_fit_is_named(released, draw, change, words):
    path, weights = released(draw)
    change(weights)
    torch.save(weights, path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_a_file_of_lightning_is_read_without_running_what_it_names(released, tmp_path, monkeypatch):
    path, weights = released(taming_file)
    lightning = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    lightning.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": lightning.__name__})
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", lightning.__name__):
            patch.setitem(sys.modules, name, lightning)
        torch.save({"state_dict": weights, "callbacks": {lightning.ModelCheckpoint: {"best": None}}}, path)
    assert torch.equal(load_tokenizer(path).codebook, weights["quantize.embedding.weight"])
