import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from mutor_img.common.errors import UserError
from mutor_img.metrics import precision_recall as module
from mutor_img.metrics.precision_recall import precision_recall


@pytest.fixture(params=[(16, 24), (4096, 8192)], ids=["many tiles", "one tile"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", request.param[0])
    monkeypatch.setattr(module, "_COLUMNS", request.param[1])


def brute_force(samples, reference, k=3):
    def distances(a, b):
        return [[((x - y) ** 2).sum() for y in b] for x in a]

    def reach(points):
        return [sorted(row)[k] for row in distances(points, points)]  # the 0-th is the point itself

    samples, reference = samples.double().numpy(), reference.double().numpy()
    between, near_s, near_r = distances(samples, reference), reach(samples), reach(reference)
    precision = sum(any(d <= r for d, r in zip(row, near_r)) for row in between)
    recall = sum(any(between[i][j] <= near_s[i] for i in range(len(samples))) for j in range(len(reference)))
    return precision / len(samples), recall / len(reference)


def cloud(count, dimension, seed, scale=1.0, shift=0.0):
    return scale * torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize("shift", [0.0, 100.0], ids=["centred", "far from 0"])
def test_counts_are_those_of_brute_force(tiles, shift):
    samples, reference = cloud(61, 9, 1, 1.2, shift), cloud(53, 9, 2, 1.0, shift)
    assert precision_recall(samples, reference) == brute_force(samples, reference)


def test_ties_and_duplicates_are_those_of_brute_force(tiles):
    samples, reference = cloud(70, 3, 1).round(), cloud(60, 3, 2).round()  # few points of a lattice, many times each
    assert precision_recall(samples, reference) == brute_force(samples, reference)


def test_near_duplicates_are_told_apart(tiles):
    centres = cloud(8, 6, 3, 50.0)
    samples = centres.repeat(6, 1) + cloud(48, 6, 4, 1e-4)
    reference = centres.repeat(5, 1) + cloud(40, 6, 5, 1e-4)
    assert precision_recall(samples, reference) == brute_force(samples, reference)


def test_counts_are_torch_fidelitys():
    samples, reference = cloud(80, 12, 1, 1.1), cloud(70, 12, 2)
    expected = calculate_precision_recall_full(samples, reference, neighborhood=3)
    assert precision_recall(samples, reference) == pytest.approx(expected, abs=1e-6)


def test_a_set_against_itself_is_perfect_and_far_sets_share_nothing(tiles):
    one = cloud(50, 8, 1)
    assert precision_recall(one, one) == (1.0, 1.0)
    assert precision_recall(one, one + 1000) == (0.0, 0.0)


def test_a_collapsed_generator_is_precise_and_recalls_nothing(tiles):
    reference = cloud(60, 8, 1)
    samples = reference[:1] + 1e-6 * cloud(40, 8, 2)
    precision, recall = precision_recall(samples, reference)
    assert precision == 1.0
    assert recall <= 1 / 60


def test_precision_and_recall_swap_with_the_sets():
    a, b = cloud(50, 5, 1, 2.0), cloud(60, 5, 2)
    assert precision_recall(a, b) == precision_recall(b, a)[::-1]
    assert precision_recall(a, b)[0] != precision_recall(a, b)[1]


@pytest.mark.parametrize("samples, reference", [
    (torch.zeros(3, 2), torch.zeros(9, 2)),
    (torch.zeros(9, 2), torch.zeros(3, 2)),
    (torch.zeros(9, 2), torch.zeros(9, 3)),
    (torch.full((9, 2), float("nan")), torch.zeros(9, 2)),
])
def test_sets_without_an_answer_are_refused(samples, reference):
    with pytest.raises(UserError):
        precision_recall(samples, reference)
