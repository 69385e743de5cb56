"""Codes that are kept, and classes that are mixed: what sampling does with them, and what it refuses."""

import copy

import pytest
import torch
from reference import sampling as reference

from mutor_img.common.errors import UserError
from mutor_img.decoding.cpu import PackedDecoder
from mutor_img.decoding.sampler import SamplingSettings, generate_samples

LABELS = torch.tensor([2, 0, 1])


def codes_of(model, **settings):
    return generate_samples(model, LABELS, torch.arange(len(LABELS)), SamplingSettings(**settings))


def test_a_mixed_class_is_a_class_whose_embedding_lies_between_two(random_model):
    model = random_model()
    ours = codes_of(model, mix_with=1, mix_share=0.3)
    other = copy.deepcopy(model)
    table = other.cls_embedding.embedding_table.weight.data
    table[:3] = 0.7 * table[:3] + 0.3 * table[1]
    for row, label in enumerate(LABELS.tolist()):
        theirs, margin = reference.sample(other, label, row, cfg_scale=2.0)
        assert margin > 1e-5 and ours[row].tolist() == theirs
    assert not torch.equal(ours[:2], codes_of(model)[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_of_nothing_is_the_class_itself_and_one_of_all_is_the_other_class(random_model, monkeypatch, dtype):
    monkeypatch.setenv("CXX", "none")  # nothing is compiled
    model = random_model(dtype=dtype)
    assert torch.equal(codes_of(model, mix_with=1, mix_share=0.0), codes_of(model))
    ones = generate_samples(model, torch.ones(3, dtype=torch.int64), torch.arange(3), SamplingSettings())
    assert torch.equal(codes_of(model, mix_with=1, mix_share=1.0), ones)


def test_nothing_is_computed_behind_the_last_code_that_is_sampled(random_model, monkeypatch):
    places, step = [], PackedDecoder.step
    monkeypatch.setattr(PackedDecoder, "step", lambda self, x, place: places.append(place) or step(self, x, place))
    codes = codes_of(random_model(), kept=(-1, 5, -1, *[4] * 17))
    assert places == [0, 1, 2] and codes[:, 1].tolist() == [5] * 3 and codes[:, 3:].eq(4).all()


@pytest.mark.parametrize(("settings", "words"), [
    ({"kept": (1,) * 20}, "kept holds 20 codes, 0 of them -1; give the model's 20"),
    ({"kept": (-1,) * 9}, "kept holds 9 codes"), ({"kept": (-1,) * 19 + (11,)}, "the largest code of kept is 11"),
    ({"kept": (-1,) * 19 + (-2,)}, "the smallest code of kept is -2"), ({"mix_with": 1}, "without each other"),
    ({"mix_share": 0.5}, "without each other"), ({"mix_with": 3, "mix_share": 0.5}, "mix_with is 3"),
    ({"mix_with": 0, "mix_share": 1.5}, "mix_share is 1.5; give a value in [0.0, 1.0]"),
], ids=str)
def test_what_cannot_be_meant_is_refused(random_model, settings, words):
    with pytest.raises(UserError) as error:
        codes_of(random_model(), **settings)
    assert words in str(error.value)
