import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from mutor_img.common.errors import UserError
from mutor_img.metrics.inception_score import inception_score


def logits(count=40, classes=7, scale=3.0, seed=0):
    return scale * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def by_numpy(values, chunk):
    p = np.exp(values - values.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    scores = []
    for start in range(0, len(p), chunk):
        part = p[start : start + chunk]
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    return np.mean(scores)


@pytest.mark.parametrize("chunk", [10, 16, 5000])
def test_file_order_is_the_plain_formula_with_a_short_last_chunk(chunk):
    x = logits()
    assert inception_score(x, order="file", chunk=chunk) == pytest.approx(by_numpy(x.double().numpy(), chunk), rel=1e-5)


def test_score_is_torch_fidelitys_where_the_chunks_agree():
    theirs = isc_features_to_metric(logits(), splits=4, shuffle=False)["inception_score_mean"]
    assert inception_score(logits(), order="file", chunk=10) == pytest.approx(theirs, rel=1e-9)


def test_class_order_loses_and_the_shuffle_does_not():
    sure = torch.eye(4).repeat_interleave(50, 0) * 50  # 50 images of each of 4 classes, in class order
    assert inception_score(sure, order="file", chunk=50) == pytest.approx(1, abs=1e-6)
    assert inception_score(sure, order="shuffle", chunk=50) > 3.5


def test_shuffle_depends_on_the_seed_alone():
    scores = [inception_score(logits(), chunk=10, seed=seed) for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]


def test_unsure_scores_one_and_sure_scores_the_number_of_classes():
    assert inception_score(torch.zeros(20, 5)) == pytest.approx(1)
    assert inception_score(1000 * torch.eye(5).repeat(4, 1)) == pytest.approx(5)


@pytest.mark.parametrize("call", [
    lambda: inception_score(torch.zeros(0, 5)),
    lambda: inception_score(torch.full((3, 5), float("nan"))),
    lambda: inception_score(logits(), order="shufle"),
])
def test_what_has_no_score_is_refused(call):
    with pytest.raises(UserError):
        call()
