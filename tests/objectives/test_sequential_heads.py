"""Sequential heads: which tokens a depth has read, which it predicts, and what its gradients reach."""

import pytest
import torch
import torch.nn.functional as F

from mutor_img.objectives.objective import Batch
from mutor_img.objectives.sequential_heads import SequentialHeads

N = 20


@pytest.fixture
def model(random_model):
    """Two blocks on 4 x 5 codes of 11 with drawn weights, and a chain of three depths."""
    model = random_model(register_offsets=None)
    torch.manual_seed(0)
    model.objective = SequentialHeads(model.config, depths=3)
    return model.eval()


@pytest.fixture
def batch():
    codes = torch.randint(11, (2, N), generator=torch.Generator().manual_seed(0))
    return Batch(torch.tensor([0, 2]), codes[:, :-1], codes)


def logits_of(model, batch):
    """Return by depth k the logits (B, N - k, V), from a chain written row by row, without the objective's forward."""
    run = model.run(batch.labels, batch.codes)
    rows, found = run.states[2], {}  # (B, N, dim)
    for k, depth in enumerate(model.objective.depths, start=1):
        joined, ids = [], []
        for t in range(N - k):  # x_{t+k} stands at t + k - 1 of the targets
            token = model.tok_embeddings(batch.targets[:, t + k - 1])
            joined.append(depth.mix(torch.cat([depth.state_norm(rows[:, t]), depth.token_norm(token)], dim=-1)))
            ids.append(t + k)
        assert min(ids) == k and max(ids) == N - 1
        causal = type(run.attend)(N - k)
        rows = depth.block(torch.stack(joined, dim=1), model.rope(torch.tensor(ids))[None], causal)
        found[k] = model.output(depth.norm(rows))
    return found


@pytest.mark.parametrize("rows", [0, 7])
def test_each_loss_is_that_of_a_loop_over_its_rows(model, batch, rows):
    sums = model(within=lambda whole: whole.objective(whole, batch, rows))
    terms = model.objective.terms(0, 0, torch.arange(2))
    for k, logits in logits_of(model, batch).items():
        expected = [F.cross_entropy(logits[b, t], batch.targets[b, t + k])  # x_{t+k+1}
                    for b in range(2) for t in range(N - k)]
        assert sums[f"depth_{k}"].item() == pytest.approx(sum(expected).item(), rel=1e-5)
        assert terms[f"depth_{k}"] == len(expected)


def test_a_row_has_read_the_token_before_its_target_and_none_after(model, batch, monkeypatch):
    read = []
    monkeypatch.setattr(model.objective, "read_out",
                        lambda x, norm, head, targets, rows: read.append(head(norm(x))) or [read[-1].sum()])
    changed = batch.targets.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 11  # x_10
    for codes in (batch.targets, changed):
        model.objective(model, Batch(batch.labels, codes[:, :-1], codes))
    for k in (1, 2, 3):
        moved = (read[k] - read[4 + k]).abs().amax(dim=(0, 2))  # (N - k,) by row t, which reads up to x_{t+k}
        assert moved[:10 - k].max() == 0 and moved[10 - k] > 1e-4


@pytest.mark.parametrize("k", [1, 3])
def test_a_depths_gradient_reaches_every_block_the_embeddings_and_the_output(model, batch, k):
    model.objective(model, batch)[f"depth_{k}"].backward()
    parts = [*model.layers, model.tok_embeddings, model.output, *(depth.block for depth in model.objective.depths[:k])]
    assert all(weight.grad.abs().max() > 0 for part in parts for weight in part.parameters())
    assert model.norm.weight.grad is None  # each depth has a last norm of its own


def test_lambda_falls_at_the_update_that_the_config_names(random_model):
    chain = SequentialHeads(random_model().config, depths=2, weight=0.3, late_weight=0.1, late_from=5)
    assert chain.weights(4, 10) == {"next_token": 1.0, "depth_1": 0.15, "depth_2": 0.15}
    assert chain.weights(5, 99) == {"next_token": 1.0, "depth_1": 0.05, "depth_2": 0.05}
    assert SequentialHeads(random_model().config).weights(10**6, 10)["depth_1"] == 0.3
