"""Every GPU check on the GPU, and as much of each as torch can do there on a CPU."""

import pytest
import torch

from mutor_img.gpu_report import checks, report
from mutor_img.gpu_report.checks import LAWS, PLAIN, CheckFailed, Place, all_checks
from mutor_img.registers import RegisterLaw
from mutor_img.transformer import PRESETS

pytestmark = pytest.mark.usefixtures("usual_limits")
CHECKS = all_checks()
CPU = Place(torch.device("cpu"), backend="eager")
SMALL = RegisterLaw("2d", (4, 5), 3, 6)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_a_check_passes_on_a_gpu(name):
    CHECKS[name](Place(torch.device("cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize("law", [PLAIN, LAWS["2d dense"], LAWS["2d sparse"]], ids=["none", "dense", "sparse"])
def test_an_update_of_b_runs_on_a_gpu_and_its_memory_is_measured(law):
    assert "GiB" in checks.measure_step(Place(torch.device("cuda")), law, batch=2, rounds=2)


# ---- what is covered


def test_every_mask_head_dimension_and_precision_has_a_check():
    for law in LAWS:
        for head_dim in {dim // heads for _, heads, dim in PRESETS.values()}:
            for precision in ("bf16", "fp32"):
                assert f"flex, {law}, head {head_dim}, {precision}" in CHECKS
    assert {law.split()[0] for law in LAWS} == {"1d", "2d"} and any(law.mixed for law in LAWS.values())
    assert any(law.every for law in LAWS.values()) and any(law.count for law in LAWS.values())
    assert set(all_checks(quick=True)) < set(CHECKS)


# ---- the bodies on a CPU: FlexAttention forward only, uncompiled decoding, gloo


BODIES = {
    "flex": lambda place: checks.check_preflight(place, SMALL, 100, "fp32"),
    "sdpa": lambda place: checks.check_sdpa(place, SMALL, 100, "bf16", compiled=True),
    "sdpa, no registers": lambda place: checks.check_sdpa(place, RegisterLaw("none", (4, 5)), 64, "fp32", False),
    "one mask": lambda place: checks.check_one_mask(place, SMALL, 16, draws=3),
    "training step": lambda place: checks.check_training_step(place, SMALL, 16, "bf16"),
    "training step, no registers": lambda place: checks.check_training_step(
        place, RegisterLaw("none", (4, 5)), 16, "fp32"),
    "decoding": lambda place: checks.check_decoding(place, 2.0),
    "drafts": lambda place: checks.check_drafts(place, "registers", "fp32"),
    "collectives": checks.check_collectives,
    "update": lambda place: checks.measure_step(place, SMALL, "mnist", batch=2, rounds=1, vocabulary=32),
}


@pytest.mark.parametrize("body", BODIES)
def test_the_body_of_a_check_runs_on_a_cpu(body):
    assert BODIES[body](CPU)


class WrongFlex(checks.FlexAttention):
    def update(self, anchors):
        super().update(anchors + 1)


def test_a_wrong_mask_fails_the_checks_of_flex_attention(monkeypatch):
    monkeypatch.setattr(checks, "FlexAttention", WrongFlex)
    with pytest.raises(CheckFailed, match="output differs by"):
        checks.check_one_mask(CPU, SMALL, 16, draws=2)


def test_a_wrong_gradient_fails_the_training_step(monkeypatch):
    right = checks.Step.compile

    def wrong(self, flex):
        self.model.norm.weight.register_hook(lambda gradient: 1.2 * gradient)
        return right(self, flex)

    monkeypatch.setattr(checks.Step, "compile", wrong)
    with pytest.raises(CheckFailed, match=r"gradient of norm\.weight differs"):
        checks.check_training_step(CPU, SMALL, 16, "fp32")


def test_wrong_codes_fail_the_check_of_decoding(monkeypatch):
    right = checks.generate
    monkeypatch.setattr(checks, "generate", lambda *given, **settings: right(*given, **settings).roll(1, dims=0))
    with pytest.raises(CheckFailed, match="differ from the uncached loop"):
        checks.check_decoding(CPU, 1.0)


def test_a_recompilation_fails_the_check_of_one_mask(monkeypatch):
    law = RegisterLaw("2d", (4, 5), 3, 6)
    draws = iter([2, 2, 5])
    monkeypatch.setattr(checks, "BATCH", 2)
    monkeypatch.setattr(RegisterLaw, "draw", lambda self, seed, step, samples: (
        torch.zeros(next(draws), 6, dtype=torch.int64), None))
    monkeypatch.setattr(checks.FlexAttention, "update", lambda self, anchors: None)
    with pytest.raises(Exception, match="recompile"):
        checks.check_one_mask(CPU, law, 16, draws=2)


# ---- the report


def fails(place):
    raise CheckFailed("gradient of k differs by 0.3 where 0.01 is allowed\nand more")


def breaks(place):
    raise ValueError("no such kernel")


def test_the_report_names_the_machine_and_every_check_and_shows_failures_in_full():
    outcomes = report.run_checks({"good": lambda place: "4 tensors", "bad": fails, "worse": breaks}, CPU)
    text = report.to_markdown(report.environment(CPU.device), outcomes)
    assert "2 of 3 checks FAILED" in text and f"torch: {torch.__version__.split('+')[0]}" in text
    assert "| good | pass |" in text and "| bad | FAIL |" in text
    assert "differs by 0.3 where 0.01 is allowed\nand more" in text and "ValueError: no such kernel" in text
    assert "all 1 checks passed" in report.to_markdown({}, outcomes[:1])


def test_a_measured_update_that_does_not_fit_is_tried_with_fewer_sequences(monkeypatch):
    def measure(place, law, batch):
        if batch > 8:
            raise torch.OutOfMemoryError("full")
        return f"{batch} sequences"

    monkeypatch.setattr(report, "measure_step", measure)
    assert [run(CPU) for run in report.timings(32).values()] == ["8 sequences"] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_is_one_line_and_exit_status_2(capsys):
    from mutor_img.common.cli import run
    from mutor_img.gpu_report.__main__ import main

    with pytest.raises(SystemExit) as exit_:
        run(main, [])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "sees no CUDA device" in error and error.count("\n") == 1
