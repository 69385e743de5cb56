"""Weighted terms by name."""

import torch

from tokenizer.training.losses import TERMS, ReconstructionLoss, check_terms


def test_terms_are_weighted_and_a_zero_leaves_one_out(monkeypatch):
    monkeypatch.setitem(TERMS, "constant", lambda device, folder: lambda reconstruction, images: torch.tensor(7.0))
    a, b = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.5)
    total, values = ReconstructionLoss({"l2": 2.0, "constant": 3.0}, torch.device("cpu"))(a, b)
    assert float(total) == 2 * 0.25 + 3 * 7
    assert {name: float(value) for name, value in values.items()} == {"l2": 0.25, "constant": 7.0}
    assert set(ReconstructionLoss({"l2": 1.0, "constant": 0.0}, torch.device("cpu")).terms) == {"l2"}


def test_a_table_of_weights_is_checked():
    assert check_terms({"l2": 1.0}) is None
    assert "'l2'" in check_terms({"l3": 1.0})
    assert "-1" in check_terms({"l2": -1.0}) and "nan" in check_terms({"l2": float("nan")})
    assert "nothing would be learnt" in check_terms({"l2": 0.0})
