"""The page "Write your own objective": its example is a whole objective, in under 100 lines."""

import re
import sys
from pathlib import Path

import pytest
import torch

from mutor_img import load_checkpoint
from mutor_img.checkpoints.folder import find_checkpoint, read_tensors
from mutor_img.common.config import load_config
from mutor_img.common.files import read_metrics
from mutor_img.objectives.config import KINDS
from mutor_img.objectives.objective import Batch
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.plan import plan_generator

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"
SECTION = PAGE.read_text().split("## Write your own objective")[1]
SOURCE, CONFIG, TEST = re.findall(r"```(?:python|yaml)\n(.*?)```", SECTION, re.DOTALL)


@pytest.fixture
def echo(monkeypatch, tmp_path):
    """The page's class, entered as the page says."""
    (tmp_path / "echo.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "echo", raising=False)
    from echo import Echo

    monkeypatch.setitem(KINDS, "echo", Echo)
    return Echo


def test_the_pages_example_is_short_and_passes_its_own_test(echo, random_model):
    assert SOURCE.count("\n") + CONFIG.count("\n") + TEST.count("\n") < 100
    model = random_model(register_offsets=None)
    model.objective = echo(model.config)
    codes = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(0))
    names = {}
    exec(TEST, names)
    names["test_the_echo_is_that_of_a_loop"](model, Batch(torch.tensor([0, 2]), codes[:, :-1], codes))


def test_the_pages_config_trains_it_and_what_is_saved_samples_without_it(echo, run_training, tmp_path):
    (tmp_path / "page.yaml").write_text(CONFIG)
    config = load_config(GeneratorConfig, tmp_path / "page.yaml")
    assert plan_generator(config)["model"]["of the objective, dropped after training"] == 16 * 256  # shrunken
    trainer = run_training("registers.kind=none", f"objective.kind={config.objective.kind}",
                           f"objective.weight={config.objective.weight}")
    row = read_metrics(trainer.run_dir)[0]
    assert row["loss"] == pytest.approx(row["next_token"] + 0.2 * row["echo"], rel=1e-5)
    assert "objective.output.weight" in read_tensors(find_checkpoint(trainer.run_dir), "model")
    assert not [name for name in load_checkpoint(trainer.run_dir).state_dict() if name.startswith("objective.")]
