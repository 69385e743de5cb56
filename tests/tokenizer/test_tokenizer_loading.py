"""Tokenizers from our folders and from released files, and one clear line for everything else."""

import argparse

import pytest
import torch

from mutor_img.checkpoints.folder import find_checkpoint, write_checkpoint
from mutor_img.common.errors import UserError
from mutor_img.common.files import file_hash
from tokenizer import load_tokenizer, loading


def test_a_run_folder_and_its_checkpoint_folder_give_the_same_tokenizer(tokenizer_run, tiny_vq):
    run = tokenizer_run()
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    for path in (run, find_checkpoint(run)):
        vq = load_tokenizer(path)
        assert torch.equal(vq.encode(images), tiny_vq().encode(images))
        assert vq.path == str(path) and vq.image_size == 8
        assert not vq.training and not any(weight.requires_grad for weight in vq.parameters())


def test_the_hash_is_that_of_the_weights_file(tokenizer_run):
    run = tokenizer_run()
    assert load_tokenizer(run).hash == file_hash(find_checkpoint(run) / "model.safetensors")


def test_averaged_weights_are_preferred(tokenizer_run, tiny_vq):
    run = tokenizer_run(ema=tiny_vq(seed=5).state_dict())
    vq = load_tokenizer(run)
    assert torch.equal(vq.quant_conv.weight, tiny_vq(seed=5).quant_conv.weight)
    assert vq.hash == file_hash(find_checkpoint(run) / "ema.safetensors")


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w, "args": argparse.Namespace(lr=1e-4)}])
def test_a_released_file_is_recognised_by_its_weights(tmp_path, monkeypatch, wrap):
    monkeypatch.setattr(loading, "RELEASED", ("vq16", "mnist"))  # the smallest network that takes this path
    weights = loading.VQModel(**loading.preset("mnist")).state_dict()
    torch.save(wrap(weights), tmp_path / "vq.pt")
    vq = load_tokenizer(tmp_path / "vq.pt")
    assert vq.options["vocabulary"] == 256 and vq.hash == file_hash(tmp_path / "vq.pt")
    assert vq.image_size == 256
    assert torch.equal(vq.post_quant_conv.weight, weights["post_quant_conv.weight"])


def test_a_released_vq8_is_told_from_a_vq16(tmp_path, monkeypatch):
    monkeypatch.setattr("mutor_img.checkpoints.llamagen._refuse_stretched", lambda *_: None)
    with torch.device("meta"):
        weights = loading.VQModel(**loading.preset("vq8")).state_dict()
    small = {name: torch.full((1,), 0.5).expand(w.shape) for name, w in weights.items()}  # one number in the file
    torch.save({"model": small}, tmp_path / "8.pt")
    vq = load_tokenizer(tmp_path / "8.pt")
    assert vq.grid_for(256) == (32, 32) and vq.vocabulary == 16384 and vq.image_size == 256


def test_loading_draws_no_random_number(tokenizer_run):
    run = tokenizer_run()
    before = torch.get_rng_state()
    load_tokenizer(run)
    assert torch.equal(torch.get_rng_state(), before)


def test_damage_is_refused(tokenizer_run):
    run = tokenizer_run()
    path = find_checkpoint(run) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(run)


def test_other_things_are_refused(tmp_path, tiny_vq):
    weights = tiny_vq().state_dict()
    torch.save(weights, tmp_path / "odd.pt")
    torch.save({"tok_embeddings.weight": torch.zeros(2, 2)}, tmp_path / "generator.pt")
    (tmp_path / "text.pt").write_text("no weights")
    write_checkpoint(tmp_path / "generator", 1, {"model": weights}, {"kind": "generator"}, keep=1)
    write_checkpoint(tmp_path / "strange", 1, {"model": weights}, {
        "kind": "tokenizer", "model": {"multipliers": [1], "depth": 3}, "image_size": 8}, keep=1)
    write_checkpoint(tmp_path / "other", 1, {"model": weights}, {
        "kind": "tokenizer", "model": tiny_vq(code_dim=5).options, "image_size": 8}, keep=1)
    for name, words in (("odd.pt", "no known tokenizer"), ("generator.pt", "of a generator"), ("text.pt", "text.pt"),
                        ("generator", "of a generator"), ("strange", "depth"), ("other", "shape"),
                        ("absent", "no such file or folder"), ("absent.pt", "no such file")):
        with pytest.raises(UserError, match=words):
            load_tokenizer(tmp_path / name)
