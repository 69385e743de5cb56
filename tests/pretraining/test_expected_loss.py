"""A run says it when its loss at step 200 is none that its config expects."""

import pytest

from mutor_img.common.errors import UserError
from mutor_img.common.files import read_metrics
from mutor_img.pretraining import task


@pytest.fixture(autouse=True)
def early(monkeypatch):
    """Look at the loss after the second update."""
    monkeypatch.setattr(task, "DOUBTED", 2)


@pytest.mark.parametrize(("band", "words"), [
    ("[0.1,2.0]", "and expected_loss is 0.1 to 2; it learns little: look at optim.lr"),
    ("[3,4]", "and expected_loss is 3 to 4; something may tell it the answers"), ("[1,4]", None), ("[]", None),
])
def test_a_loss_outside_of_the_band_is_one_warning(run_training, capfd, band, words):
    trainer = run_training(f"expected_loss={band}")
    loss = read_metrics(trainer.run_dir)[1]["next_token"]
    lines = [line for line in capfd.readouterr().out.splitlines() if "warning:" in line]
    assert len(lines) == (words is not None) and 2 < loss < 3
    assert not words or f"warning: next_token is {loss:.3f} after 2 updates, {words}" in lines[0]


def test_a_run_that_starts_from_weights_is_not_doubted(run_training, capfd, tmp_path):
    run_training("train.steps=1")
    run_training(f"run_dir={tmp_path}/second", f"init_from={tmp_path}/runs/run", "expected_loss=[8,9]")
    assert "warning:" not in capfd.readouterr().out


def test_a_run_whose_rate_still_rises_is_not_doubted(run_training, capfd):
    run_training("expected_loss=[8,9]", "optim.warmup_steps=3")
    assert "warning:" not in capfd.readouterr().out


@pytest.mark.parametrize("band", ["[1]", "[2,1]", "[1,2,3]"])
def test_a_band_that_is_none_is_refused(run_training, band):
    with pytest.raises(UserError, match=r"expected_loss is .*; give the lowest and the highest next-token loss"):
        run_training(f"expected_loss={band}")
