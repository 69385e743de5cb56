"""The plan of a run: counted once more by hand, for every shipped config, without data or a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mutor_img.blocks import ModelConfig
from mutor_img.common.config import load_config
from mutor_img.common.errors import UserError
from mutor_img.pretraining.command import main
from mutor_img.pretraining.config import GeneratorConfig, PlanConfig
from mutor_img.pretraining.memory import Step, step_memory
from mutor_img.pretraining.plan import GIB, largest_micro_batch, plan_generator, run_flops, run_summary
from mutor_img.transformer import Transformer

FOLDER = Path(__file__).parents[2] / "configs" / "imagenet256"
NAMES = sorted(str(path.relative_to(FOLDER.parent)) for path in FOLDER.parent.glob("imagenet*/*.yaml")
               if path.stem not in ("tokenizer", "study"))


def plan(name="mutor2d_b_80", *overrides):
    return plan_generator(load_config(GeneratorConfig, FOLDER / f"{name}.yaml", overrides))


def section(sections, start):
    return next(rows for title, rows in sections.items() if title.startswith(start))


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_config_fits_the_devices_that_it_is_planned_for(name):
    fits = section(plan_generator(load_config(GeneratorConfig, FOLDER.parent / name)), "what fits")
    assert fits["this run"] == "yes" and fits["to spare, GiB"] > 15  # a wide margin on 80 GB


def test_parameters_tokens_and_flops_are_those_counted_by_torch():
    sections = plan("mutor2d_b", "model.grid=[8,8]", "train.global_batch=16")
    config = ModelConfig.preset("B", grid=(8, 8), register_offsets=())
    with torch.device("meta"):
        model, places = Transformer(config), torch.zeros(1, 64, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(places[:, 0], places[:, 1:], places, places)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    update = section(sections, "per update")
    pairs = 64 * 65 / 2 + sum(t + 2 for t in range(64))  # of regular inputs; of registers, themselves included
    assert section(sections, "model")["parameters"] == sum(p.numel() for p in model.parameters())
    assert update["FLOPs per update, forward and backward"] == pytest.approx(3 * 16 * (products + 4 * 12 * 768 * pairs))
    assert update["registers"] == update["code tokens"] == 16 * 64
    assert update["FLOPs in attention, %"] == pytest.approx(
        100 * 4 * 12 * 768 * pairs / (products + 4 * 12 * 768 * pairs))


@pytest.mark.parametrize("name", ["imagenet256/mutor2d_b_80", "imagenet256/mutor2d_3b_80", "fashion/rear",
                                  "fashion/npp"])
def test_the_summary_of_a_run_is_the_plan_in_short(name):
    config = load_config(GeneratorConfig, name)
    plan, found = plan_generator(config), run_summary(config)
    [memory] = [rows["in all"] for title, rows in plan.items() if title.startswith("memory per device")]
    assert found["memory per device, GiB (computed)"] == memory
    assert found["tokens through the network per update"] == plan["per update"]["tokens through the network"]
    assert found["FLOPs of the run"] == pytest.approx(run_flops(config, config.train.steps))
    assert found["FLOPs per update"] == pytest.approx(plan["per update"]["FLOPs per update, forward and backward"])
    model = plan["model"]
    assert found["trained parameters"] == model["parameters"] + model["of the objective, dropped after training"]


def test_attention_takes_half_at_the_length_that_the_plan_names():
    length = section(plan("ntp_b"), "per update")["codes per image at which attention takes half"]
    side = round(length**0.5)
    share = section(plan("ntp_b", f"model.grid=[{side},{side}]"), "per update")["FLOPs in attention, %"]
    assert share == pytest.approx(50, abs=0.5)


def test_time_follows_from_flops_and_the_stated_mfu():
    sections = plan("ntp_b", "plan.devices=4", "plan.peak_tflops=100", "plan.mfu=0.5")
    time = section(sections, "time at")
    flops = section(sections, "per update")["FLOPs per update, forward and backward"]
    assert time["seconds per update"] == pytest.approx(flops / (4 * 100e12 * 0.5))
    assert time["GPU-hours"] == pytest.approx(4 * 360_000 * time["seconds per update"] / 3600)


def test_without_a_stated_mfu_time_is_the_sum_of_the_cost_models_terms():
    found = {}
    for name in ("ntp_b", "ntp_xl"):
        sections = plan(name, "plan.peak_tflops=312", "plan.memory_tbs=2.04")
        terms, time = section(sections, "time of an update"), section(sections, "time at")
        flops = section(sections, "per update")["FLOPs per update, forward and backward"]
        total = terms.pop("in all")
        assert sum(terms.values()) == pytest.approx(total) == pytest.approx(1000 * time["seconds per update"])
        found[name] = flops / (8 * 312e12 * time["seconds per update"])
        assert any(title.startswith(f"time at {found[name]:.0%} of 8 x 312") for title in sections)
    assert found["ntp_b"] < found["ntp_xl"]  # wider matrices have less traffic for their FLOPs


def test_in_fp32_the_assumed_peak_is_that_of_fp32():
    low, full = (section(plan("ntp_b", f"train.precision={name}", "plan.mfu=0.4"), "time at")["seconds per update"]
                 for name in ("bf16", "fp32"))
    assert full == pytest.approx(989 / 67 * low)


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    config, step = ModelConfig.preset("L", register_offsets=()), Step(1, 80)
    most = largest_micro_batch(config, 342_910_976, step, 40 * GIB, share=10**6)
    fits = [step_memory(config, 342_910_976, Step(n, 80)).total <= 40 * GIB for n in (most, most + 1)]
    assert fits == [True, False]


@pytest.mark.parametrize("share", [1, 7, 24, 40])
def test_the_largest_micro_batch_of_a_sharded_run_is_that_of_trying_all(share):
    """Fewer sequences than a device's share accumulate gradients, and may need more memory than the whole share."""
    config, step = ModelConfig.preset("L", register_offsets=()), Step(1, 80, shards=8)

    def needed(sequences):
        return step_memory(config, 342_910_976, replace(step, sequences=sequences,
                                                        accumulate=sequences < share)).total

    for room in (needed(share), needed(share) - 1, needed(share + 3), needed(2) * 1.01):
        tried = max((n for n in range(1, 80) if needed(n) <= room), default=0)
        assert largest_micro_batch(config, 342_910_976, step, room, share) == tried


def test_a_run_that_does_not_fit_is_told_the_micro_batch_that_does():
    fits = section(plan("mutor2d_xl_80", "train.micro_batch=0"), "what fits")
    assert fits["this run"] == "no: train.micro_batch=64"
    advised = section(plan("mutor2d_xl_80", "train.micro_batch=64"), "what fits")
    assert advised["this run"] == "yes" and 64 <= advised["sequences per forward pass, at most"] < 128
    tiny = section(plan("mutor2d_xl_80", "plan.device_gib=5"), "what fits")
    assert tiny["this run"].startswith("no, not even one sequence")


def test_on_more_devices_a_micro_batch_is_no_larger_than_a_devices_share():
    assert section(plan("ntp_xl", "plan.devices=32"), "per update")["sequences per forward pass"] == 32


def test_sharding_divides_what_is_kept_and_sends_more_with_every_forward_pass():
    whole, parts = plan("ntp_3b", "train.parallel=ddp"), plan("ntp_3b")
    for row in ("weights", "gradients", "optimiser"):
        assert section(whole, "memory")[row] == pytest.approx(32 * section(parts, "memory")[row])
    sent = [sum(section(sections, "communication").values()) for sections in (whole, parts)]
    assert sent[0] == pytest.approx(31 / 32 * 8 * 3_096_659_200 / GIB) == pytest.approx(sent[1])  # bf16, but twice
    halves = plan("ntp_3b", "train.micro_batch=16")
    assert sum(section(halves, "communication").values()) == pytest.approx(1.5 * sent[1])
    split = section(halves, "memory")  # whole gradients until the last of two passes
    assert split["gradients"] == pytest.approx(section(whole, "memory")["weights"] * (1 + 1 / 32))


@pytest.mark.parametrize("override, message", [
    ("plan.devices=3", "not divisible by plan.devices=3"), ("train.micro_batch=60", "give a divisor of"),
    ("plan.mfu=1.5", "plan.mfu is 1.5"), ("plan.memory_tbs=0", "plan.memory_tbs is 0"),
    ("plan.devices=0", "plan.devices is 0"),
    ("plan.device_gib=0", "plan.device_gib is 0"), ("plan.usable=2", "plan.usable is 2"),
    ("plan.peak_tflops=-1", "plan.peak_tflops is -1")])
def test_a_plan_that_cannot_be_is_one_clear_line(override, message):
    with pytest.raises(UserError, match=message) as error:
        plan("ntp_b", override)
    assert "\n" not in str(error.value)


def test_a_dry_run_prints_sections_with_units(capsys):
    main(["--config", str(FOLDER / "mutor2d_b.yaml"), "--dry-run", "data.codes=nowhere"])
    printed = capsys.readouterr().out
    for words in ("110,889,216", "memory per device, GiB", "logits and loss", "GPU-hours", "a checkpoint, GiB",
                  "computed, not measured", "matrix products", "waits for the CPU"):
        assert words in printed
    assert PlanConfig().devices == 1
