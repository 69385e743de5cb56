"""A run goes on as the run that it is: what makes another run is refused, what else changes is said and kept."""

import shutil

import numpy as np
import pytest
import yaml

from mutor_img.checkpoints.folder import checkpoint_at
from mutor_img.common.config import field_names
from mutor_img.common.errors import UserError
from mutor_img.convert import main as convert
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.training.changes import IDENTITY, SILENT
from tokenizer.training.config import TokenizerConfig


@pytest.mark.parametrize("change", ["seed=7", "registers.count=3", "registers.kind=none", "model.dropout=0.3",
                                    "train.global_batch=8"])
def test_another_run_in_the_folder_of_one_is_refused_finished_or_not(run_training, change):
    trainer = run_training()
    before = (trainer.run_dir / "config.yaml").read_bytes()
    key = change.split("=")[0]
    for more in ([], ["train.steps=9"]):
        with pytest.raises(UserError, match=f"{key} .*now it is .*another run_dir"):
            run_training(change, *more)
    assert (trainer.run_dir / "config.yaml").read_bytes() == before


def test_other_codes_are_another_run_and_the_same_ones_elsewhere_are_not(run_training, make_codes, tmp_path):
    run_training()
    with pytest.raises(UserError, match="trained on other codes"):
        run_training(f"data.codes={make_codes(tmp_path / 'others', seed=5)}", "train.steps=9")
    run_training(f"data.codes={make_codes(tmp_path / 'copy')}", "train.steps=5")


def test_a_finished_run_says_what_it_did_not_apply(run_training, capsys):
    run_training()
    run_training("optim.lr=1e-5")
    assert "nothing to do; not applied: optim.lr 0.01 -> 1e-05\n" in capsys.readouterr().out


def test_a_changed_setting_is_said_and_the_earlier_config_stays(run_training, capsys):
    trainer = run_training()
    lr = yaml.safe_load((trainer.run_dir / "config.yaml").read_text())["optim"]["lr"]
    run_training("train.steps=6", "optim.lr=1e-5", "train.log_every=2")
    assert f"going on after update {trainer.step}; optim.lr {lr} -> 1e-05\n" in capsys.readouterr().out
    kept = [yaml.safe_load((trainer.run_dir / name).read_text())["optim"]["lr"]
            for name in (f"config_until_{trainer.step:08d}.yaml", "config.yaml")]
    assert kept == [lr, 1e-5]
    for step in (4, 5, 6):  # as if that sitting was killed before it had saved
        shutil.rmtree(checkpoint_at(trainer.run_dir, step))
    run_training("train.steps=4", "optim.lr=1e-6")
    assert yaml.safe_load((trainer.run_dir / f"config_until_{trainer.step:08d}.yaml").read_text())["optim"]["lr"] == lr


def test_an_average_that_a_run_has_not_kept_cannot_go_on(run_training):
    run_training()
    with pytest.raises(UserError, match=r"train\.ema was 0\.0, now it is 0\.9; give train\.ema=0\.0") as caught:
        run_training("train.ema=0.9", "train.steps=5")
    assert "\n" not in str(caught.value)
    assert run_training("train.steps=5").step == 5


def test_weights_alone_are_no_run_to_go_on_with(run_training, tmp_path):
    trainer = run_training()
    convert(["--source", str(trainer.run_dir), "--out", str(tmp_path / "weights")])
    with pytest.raises(UserError, match="only weights, no run to continue; give another run_dir, and init_from"):
        run_training(f"run_dir={tmp_path / 'weights'}")


def test_the_rules_name_fields_that_exist():
    names = [*field_names(GeneratorConfig), *field_names(TokenizerConfig)]
    for rule in (*IDENTITY, *SILENT):
        assert any(name == rule or (rule.endswith(".") and name.startswith(rule)) for name in names), rule
    assert np.all([not rule.startswith(tuple(IDENTITY)) or rule in ("model.attention", "model.loss_chunk")
                   for rule in SILENT])
