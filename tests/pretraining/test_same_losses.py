"""Next-token prediction and every variant of MuToR give the losses that they gave when they were first measured."""

import json
from pathlib import Path

import pytest
import torch

from mutor_img import mutor_loss
from mutor_img.common.config import load_config
from mutor_img.common.files import read_metrics
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training.runtime import Runtime

DENSE = "registers.count=null"
VARIANTS = {
    "next-token": ("registers.kind=none",),
    "next-token, chunked": ("registers.kind=none", "model.loss_chunk=7"),
    "1d, dense": ("registers.kind=1d", DENSE),
    "1d, sparse": ("registers.kind=1d",),
    "1d, every second": ("registers.kind=1d", DENSE, "registers.every=2"),
    "1d, sparse, mixed, per offset": ("registers.kind=1d", "registers.mixed_offsets=true",
                                      "registers.embedding=per_offset"),
    "2d, dense": (DENSE,),
    "2d, dense, chunked": (DENSE, "model.loss_chunk=7"),
    "2d, dense, without wrapping": (DENSE, "registers.wrap=false"),
    "2d, sparse": (),
    "2d, sparse, without wrapping": ("registers.count=3", "registers.wrap=false"),
    "2d, sparse, mixed": ("registers.mixed_offsets=true",),
    "2d, every third, mixed": (DENSE, "registers.every=3", "registers.mixed_offsets=true"),
    "2d, sparse, per offset, weight 0.1": ("registers.embedding=per_offset", "registers.loss_weight=0.1"),
}
NAMES = ("loss", "next_token", "register", "gradient_norm")
RECORD = Path(__file__).with_name("same_losses.json")  # by variant: NAMES of each of three updates


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_updates_log_the_recorded_values(variant, run_training):
    trainer = run_training(*VARIANTS[variant], "model.dropout=0.1", "train.micro_batch=2")
    rows, recorded = read_metrics(trainer.run_dir), json.loads(RECORD.read_text())[variant]
    for row, theirs in zip(rows, recorded, strict=True):  # the last bits of sums differ between kinds of processors
        mine = [row.get(name) for name in NAMES]
        assert [x is None for x in mine] == [x is None for x in theirs]
        assert [x for x in mine if x] == pytest.approx([x for x in theirs if x], rel=1e-5)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "chunked" not in v])
def test_loss_and_gradients_are_those_of_the_public_functions_bit_for_bit(variant, run_file, tiny):
    config = load_config(GeneratorConfig, run_file, VARIANTS[variant])
    task = GeneratorTask(config, Runtime.start())
    torch.nn.init.normal_(task.model.output.weight)  # from zeros no gradient would pass
    samples = torch.arange(4, 8)
    _, labels, codes = task.batch(1, samples)
    registers = () if config.law().kind == "none" else config.law().draw(config.seed, 1, samples)
    logits = task.model(labels, codes[:, :-1], *registers)
    expected = mutor_loss(*(logits if registers else (logits, None)), codes, *registers,
                          weight=config.registers.loss_weight)
    found, _ = task.loss(task.model, 1, samples)
    assert found.item() == expected.item()
    for mine, theirs in zip(*(torch.autograd.grad(x, list(task.model.parameters())) for x in (found, expected))):
        assert torch.equal(mine, theirs)
