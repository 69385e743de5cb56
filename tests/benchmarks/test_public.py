"""What ours is measured against does the same work: public code's model has our losses and our samples."""

import json

import pytest
import torch
from torch.nn import functional as F

from benchmarks import sampling, train_step
from benchmarks.public import PublicTransformer
from mutor_img import generate
from mutor_img.common.errors import UserError


@pytest.fixture
def both(random_model):
    """Our model and the public one with the same weights, 4 x 4 codes."""
    ours = random_model((4, 4), vocabulary=11, classes=3)
    config = ours.config
    public = PublicTransformer(config.layers, config.heads, config.dim, config.hidden, 4, 11, 3).eval()
    shorter = {"cls_embedding.embedding_table": "class_table", "tok_embeddings": "code_table", "attention.w": "w",
               "feed_forward.": ""}
    weights = ours.state_dict()
    del weights["register_embedding.weight"]
    for long, short in shorter.items():
        weights = {name.replace(long, short): weight for name, weight in weights.items()}
    public.load_state_dict(weights)
    return ours, public


def test_the_public_model_has_our_loss(both):
    ours, public = both
    codes, labels = torch.randint(11, (5, 16)), torch.arange(5) % 3
    logits = ours(labels, codes[:, :-1])
    logits = logits[0] if isinstance(logits, tuple) else logits
    wanted = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert public(labels, codes).item() == pytest.approx(wanted.item(), abs=1e-5)


def test_the_public_sampler_draws_our_samples_where_one_code_is_certain(both):
    ours, public = both
    for model in both:
        model.output.weight.data *= 1e4
    labels = torch.arange(3)
    assert torch.equal(public.generate(labels, 2.0), generate(ours, labels, cfg_scale=2.0))


@pytest.mark.parametrize("main, words", [
    (train_step.main, ["--preset", "tiny", "--batch", "2", "--dtype", "fp32", "--seconds", "0.1"]),
    (sampling.main, ["--preset", "tiny", "--grid", "3", "--dtype", "fp32", "--seconds", "0.1", "--batch-sizes", "2",
                     "--vocabulary", "64", "--threads", "1"])])
@pytest.mark.parametrize("who", ["ours", "public"])
def test_each_side_is_measured_alone(main, words, who, capsys, monkeypatch):
    monkeypatch.setattr(train_step, "VOCABULARY", 64)
    main([*words, "--measure", who])
    rate, *shares = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert rate > 0 and all(0 < share < 2 for share in shares)
    assert len(shares) == (2 if (main, who) == (sampling.main, "ours") else 1)  # and that of products alone


@pytest.mark.parametrize("main", [train_step.main, sampling.main])
def test_an_unknown_side_is_named(main):
    with pytest.raises(UserError, match="--against is 'publik'; did you mean 'public'"):
        main(["--against", "publik"])
