"""freeze: weights that keep their bytes, whatever else moves."""

import pytest
import torch

from mutor_img.checkpoints.folder import find_checkpoint, read_tensors
from mutor_img.common.config import load_config
from mutor_img.common.errors import UserError
from mutor_img.pretraining.config import GeneratorConfig


def test_frozen_weights_stay_to_the_byte_and_all_others_move(run_training, tmp_path):
    frozen = "freeze=['layers.0.*',tok_embeddings.weight]"
    trainer = run_training(frozen, "optim.weight_decay=5", "train.ema=0.5", "train.steps=2")
    start = run_training(f"run_dir={tmp_path}/start", "optim.lr=1e-30", "train.steps=1").model.state_dict()
    for group in ("model", "ema"):
        for name, weight in read_tensors(find_checkpoint(trainer.run_dir), group).items():
            kept = name.startswith("layers.0.") or name == "tok_embeddings.weight"
            assert torch.equal(weight, start[name]) == kept, (group, name)
    assert not any("layers.0." in name for name in read_tensors(find_checkpoint(trainer.run_dir), "optimizer"))


def test_a_run_may_thaw_on_its_way(run_training, capsys):
    before = run_training("freeze=[layers.*]", "train.steps=1").model.state_dict()["layers.1.feed_forward.w1.weight"]
    after = run_training("train.steps=2").model.state_dict()["layers.1.feed_forward.w1.weight"]
    assert "going on after update 1; freeze ['layers.*'] -> []" in capsys.readouterr().out
    assert not torch.equal(before, after)


@pytest.mark.parametrize(("freeze", "words"), [
    ("[layer.0.*]", "freeze: 'layer.0.*' matches no weight of the model; the nearest name is 'layers.0."),
    ("['*']", "freeze: * leaves no weight to train; leave a pattern out"),
    ("[cls_embedding]", "the nearest name is 'cls_embedding.embedding_table.weight'"),
])
def test_a_pattern_that_cannot_be_meant_is_refused_before_anything_is_read(run_file, freeze, words):
    with pytest.raises(UserError) as error:
        load_config(GeneratorConfig, run_file, [f"freeze={freeze}", "data.codes=absent"])
    assert words in str(error.value)
