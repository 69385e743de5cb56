"""What the tokenizer's plan says of memory is what a real forward pass makes autograd keep."""

from pathlib import Path

import pytest
import torch

from mutor_img.common.config import load_config
from tokenizer.network.vq import VQModel
from tokenizer.training.config import TokenizerConfig
from tokenizer.training.plan import activation_bytes

CONFIGS = Path(__file__).parents[2] / "configs"


def test_activations_are_the_bytes_that_a_real_pass_saves():
    config = load_config(TokenizerConfig, CONFIGS / "mnist" / "tokenizer.yaml",
                         ["train.precision=fp32", "loss.adversarial_weight=0"])
    torch.manual_seed(0)
    model = VQModel(**config.model.options())
    weights, kept = {p.data_ptr() for p in model.parameters()}, []
    for count in (1, 2):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x, saved=saved: saved.setdefault(x.untyped_storage().data_ptr(), x) is None or x, lambda x: x):
            outputs = model(torch.rand(count, 1, 32, 32) * 2 - 1)
        assert outputs[0].shape == (count, 1, 32, 32)
        kept.append(sum(x.untyped_storage().nbytes() for address, x in saved.items() if address not in weights))
    assert activation_bytes(config) == pytest.approx(kept[1] - kept[0], rel=0.03)


def test_lpips_and_the_discriminator_add_to_vq16_which_keeps_more_than_a_gigabyte_an_image():
    path = CONFIGS / "imagenet256" / "tokenizer.yaml"
    whole, *parts = (activation_bytes(load_config(TokenizerConfig, path, changes)) for changes in (
        [], ["loss.terms.lpips=0"], ["loss.adversarial_weight=0"]))
    assert 2**30 < max(parts) < whole < 2 * 2**30
