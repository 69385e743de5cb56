"""Quantisation against distances in float64, its gradients, and codes brought back."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from tokenizer.network import quantizer
from tokenizer.network.quantizer import Quantizer, code_use, count_codes, usage_loss


def build(vocabulary=50, dim=4, seed=0):
    torch.manual_seed(seed)
    codebook = Quantizer(vocabulary, dim)
    with torch.no_grad():
        codebook.embedding.weight.mul_(torch.rand(vocabulary, 1) * 3 + 0.1)  # far from unit length
    return codebook, torch.randn(3, dim, 5, 7) * 4


def test_the_chosen_code_is_the_nearest_on_the_unit_sphere():
    codebook, latents = build()
    found = codebook(latents)
    rows = latents.double().permute(0, 2, 3, 1).reshape(3, 35, 4)
    rows = rows / rows.norm(dim=2, keepdim=True)
    codes = codebook.embedding.weight.detach().double()
    codes = codes / codes.norm(dim=1, keepdim=True)
    distances = ((rows[:, :, None] - codes) ** 2).sum(-1)  # (3, 35, 50)
    assert torch.equal(found.indices, distances.argmin(-1))
    expected = codes[found.indices].transpose(1, 2).reshape(3, 4, 5, 7)
    torch.testing.assert_close(found.latents.double(), expected, rtol=0, atol=1e-6)
    for loss in found.losses.values():
        torch.testing.assert_close(loss.double(), distances.min(-1).values.mean() / 4)


def test_slices_of_the_search_change_nothing(monkeypatch):
    codebook, latents = build()
    whole = codebook(latents).indices
    monkeypatch.setattr(quantizer, "_SCORES_AT_ONCE", 200)  # 4 positions at a time
    assert torch.equal(codebook(latents).indices, whole)


def test_a_code_is_its_own_nearest():
    codebook, _ = build()
    codes = torch.arange(50).view(2, 25)
    assert torch.equal(codebook.nearest(codebook.lookup(codes, (5, 5))), codes)


def test_the_gradient_passes_straight_through():
    codebook, latents = build()
    weight = torch.randn_like(latents)
    latents.requires_grad_()
    (codebook(latents).latents * weight).sum().backward()
    straight, = torch.autograd.grad((F.normalize(latents, dim=1) * weight).sum(), latents)
    torch.testing.assert_close(latents.grad, straight)
    assert codebook.embedding.weight.grad is None or not codebook.embedding.weight.grad.any()


def test_each_loss_moves_one_side_only():
    codebook, latents = build()
    latents.requires_grad_()
    losses = codebook(latents).losses
    losses["codebook"].backward(retain_graph=True)
    assert latents.grad is None and codebook.embedding.weight.grad.any()
    codebook.embedding.weight.grad = None
    losses["commitment"].backward()
    assert latents.grad.any() and codebook.embedding.weight.grad is None


def test_the_length_of_a_stored_row_does_not_matter():
    codebook, latents = build()
    before = codebook(latents)
    with torch.no_grad():
        codebook.embedding.weight.mul_(torch.rand(50, 1) + 0.5)
    after = codebook(latents)
    assert torch.equal(before.indices, after.indices)
    torch.testing.assert_close(before.latents, after.latents)


def test_idle_codes_are_counted_and_moved():
    codebook, _ = build(vocabulary=4, dim=2)
    for _ in range(3):
        codebook.note_use(torch.tensor([5, 0, 1, 0]), torch.tensor(False))
    assert codebook.idle(3).tolist() == [False, True, False, True] and not codebook.idle(4).any()
    kept = codebook.codes()[[0, 2]]
    codebook.reseed(codebook.idle(3), torch.tensor([[0.6, 0.8], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0]]))
    assert not codebook.idle(1).any() and codebook.codes()[[1, 3]].tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert torch.equal(codebook.codes()[[0, 2]], kept)


def test_bf16_latents_are_compared_in_fp32():
    codebook, latents = build()
    with torch.autocast("cpu", torch.bfloat16):
        found = codebook(latents.bfloat16())
    assert found.latents.dtype == torch.float32
    assert torch.equal(found.indices, codebook(latents.bfloat16().float()).indices)


@pytest.mark.parametrize("counts, expected", [([7, 7, 7, 7], 4), ([9, 0, 0, 0], 1), ([1, 3], math.exp(0.5623351446))])
def test_perplexity_is_the_number_of_codes_in_equal_use(counts, expected):
    assert code_use(torch.tensor(counts))["perplexity"].item() == pytest.approx(expected)


def test_codes_are_counted_as_bincount_does():
    indices = torch.randint(5, (3, 7))
    assert torch.equal(count_codes(indices, 9), torch.bincount(indices.flatten(), minlength=9))


def test_the_usage_loss_is_one_entropy_less_another():
    codebook, latents = build(vocabulary=9, dim=3)
    assert "entropy" not in codebook(latents[:, :3]).losses
    codebook.with_usage_loss = True
    found = codebook(latents[:, :3]).losses["entropy"]
    z = latents[:, :3].permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
    e = codebook.embedding.weight.detach().double().numpy()
    z, e = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (z, e))
    scores = -((z[:, None] - e) ** 2).sum(2) / 0.01  # (positions, codes)
    choice = np.exp(scores - scores.max(1, keepdims=True))
    choice /= choice.sum(1, keepdims=True)
    expected = scipy.stats.entropy(choice, axis=1).mean() - scipy.stats.entropy(choice.mean(0))
    assert float(found) == pytest.approx(expected, abs=1e-5)
    assert "entropy" not in codebook.eval()(latents[:, :3]).losses


def test_the_usage_loss_is_least_where_all_codes_are_chosen_surely_and_pulls_unused_ones_in():
    codes = torch.eye(4)
    even = usage_loss(codes.t().reshape(1, 4, 2, 2), codes)
    assert float(even) == pytest.approx(-math.log(4), abs=1e-5)
    lonely = codes[:1].t().repeat(1, 4).reshape(1, 4, 2, 2).requires_grad_()
    loss = usage_loss(lonely, codes.requires_grad_())
    assert float(loss) > -1e-5  # one code for all: no spread to be had
    loss.backward()
    assert bool(lonely.grad.isfinite().all() and codes.grad.isfinite().all())
