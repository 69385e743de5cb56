"""Precision auto: bf16 where the processor computes in it, else fp32."""

import pytest
import torch

from mutor_img.pretraining.command import main
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.training import command
from mutor_img.training.command import read_training, training_parser
from mutor_img.training.hardware import precision_on


@pytest.mark.parametrize("instructions, precision", [
    ({"avx2": True, "avx512_bf16": False}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"),
    ({"sve_bf16": True}, "bf16"), ({}, "fp32")])
def test_auto_is_what_the_processor_computes_in(instructions, precision, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "c.yaml").write_text("train: {precision: auto}\n")
    arguments = training_parser(description="", example="").parse_args(["--config", str(tmp_path / "c.yaml")])
    config = read_training(arguments, GeneratorConfig, dict)
    assert config.train.precision == precision
    assert precision_on(torch.device("cpu"), "bf16") == "bf16"  # a choice of the user's stays
    assert precision_on(torch.device("cuda"), "auto") == "bf16"


@pytest.mark.parametrize("native", [True, False])
def test_bf16_on_a_processor_without_it_is_pointed_out(native, run_file, tiny, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    monkeypatch.setattr(command, "train", lambda job, config, runtime, stop: None)
    main(["--config", str(run_file), "train.precision=bf16"])
    assert ("no bf16 instructions" in capsys.readouterr().err) is not native
