"""Files of version 0.1.0 stay readable, and those of a later format are refused in one line (docs/formats.md)."""

import json

import pytest
import torch

from mutor_img import load_checkpoint
from mutor_img.checkpoints.folder import find_checkpoint, write_checkpoint
from mutor_img.common.config import load_config
from mutor_img.common.errors import UserError
from mutor_img.common.files import read_json, write_sealed
from mutor_img.data.store import Codes
from mutor_img.pretraining.config import GeneratorConfig

# As they were written first. Keys that come later need defaults: add nothing here.
CHECKPOINT = """{"format": "mutor_img checkpoint 1", "step": 3, "seconds": 1.5, "samples": 12, "kind": "generator",
 "model": {"layers": 2, "heads": 2, "dim": 32, "grid": [4, 5], "vocabulary": 11, "classes": 3, "dropout": 0.1,
           "drop_path": 0.0, "register_offsets": []},
 "codes": {"class_names": ["a", "b", "c"], "image_size": 32, "tokenizer": "tok", "tokenizer_hash": "aa", "stores": []}}
"""
CODES = """{"format": "mutor_img codes 1", "block": 4096, "grid": [4, 5], "vocabulary": 16,
 "class_names": ["a", "b", "c"], "views": ["plain", "mirror"],
 "crop": "center", "image_size": 32, "tokenizer": "tok", "tokenizer_hash": "aa"}"""
CONFIG = """format: mutor_img config 1
seed: 3
data: {codes: codes/mnist, val_codes: null}
model: {preset: mnist, grid: [8, 8], vocabulary: 256, classes: 10, dropout: 0.0, drop_path: 0.0, class_dropout: 0.1,
        attention: auto, loss_chunk: 0}
registers: {kind: 2d, count: 20, d_max: 4, loss_weight: 0.2, every: null, mixed_offsets: false, embedding: shared,
            wrap: true}
optim: {lr: 2.0e-3, betas: [0.9, 0.95], weight_decay: 0.05, clip: 1.0, schedule: cosine, warmup_steps: 100}
train: {steps: 7000, global_batch: 8, micro_batch: 0, precision: fp32, compile: true, parallel: ddp, ema: 0.995,
        activation_checkpointing: false, log_every: 100, checkpoint_every: 1000, keep: 1, validate_every: 1000}
"""


def rewrite(path, **changes):
    write_sealed(path, {**read_json(path), **changes})


def test_a_checkpoint_of_0_1_0_is_loaded(random_model, tmp_path):
    model = random_model()
    folder = write_checkpoint(tmp_path, 3, {"model": model.state_dict()}, {}, 1)
    files = json.loads((folder / "checkpoint.json").read_text())["files"]
    (folder / "checkpoint.json").write_text(json.dumps({**json.loads(CHECKPOINT), "files": files}))
    labels, codes = torch.tensor([0, 2]), torch.arange(38).view(2, 19) % 11
    assert torch.equal(load_checkpoint(tmp_path)(labels, codes), model(labels, codes))


def test_a_code_store_of_0_1_0_is_opened(codes_folder):
    written = json.loads((codes_folder / "codes.json").read_text())
    (codes_folder / "codes.json").write_text(json.dumps({**json.loads(CODES), "checksums": written["checksums"]}))
    Codes(codes_folder).verify()


def test_a_config_of_0_1_0_is_read(tmp_path):
    (tmp_path / "old.yaml").write_text(CONFIG)
    config = load_config(GeneratorConfig, tmp_path / "old.yaml")
    assert (config.seed, config.registers.count, config.train.ema) == (3, 20, 0.995)


def test_a_run_writes_down_the_format_of_its_config(run_training):
    trainer = run_training("train.steps=1")
    record = trainer.run_dir / "config.yaml"
    assert record.read_text().startswith("format: mutor_img config 1\n")
    assert load_config(GeneratorConfig, record) == trainer.config


@pytest.mark.parametrize(("found", "words"), [
    ("mutor_img {} 2", "has the format 'mutor_img {} 2', and this version of mutor_img reads 'mutor_img {} 1'; update"),
    ("mutor_img {} 10", "update mutor_img"), ("something 1", "its format is 'something 1', not 'mutor_img {} 1'"),
    (None, "its format is None, not 'mutor_img {} 1'; check the path"),
])
def test_another_format_is_one_line(random_model, tmp_path, found, words):
    folder = write_checkpoint(tmp_path, 3, {"model": random_model().state_dict()}, {"kind": "generator"}, 1)
    rewrite(find_checkpoint(folder) / "checkpoint.json", format=found and found.format("checkpoint"))
    (tmp_path / "a.yaml").write_text(f"format: {found.format('config') if found else 5}\nseed: 1\n")
    for name, read in (("checkpoint", lambda: load_checkpoint(folder)),
                       ("config", lambda: load_config(GeneratorConfig, tmp_path / "a.yaml"))):
        with pytest.raises(UserError) as error:
            read()
        wanted = words.format(name, name).replace("None", "'5'" if name == "config" else "None")
        assert wanted in str(error.value) and "\n" not in str(error.value)
