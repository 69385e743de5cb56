"""MFU is measured against what the device can do in the run's own precision."""

from itertools import count

import pytest
import torch

from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training import hardware
from mutor_img.training.hardware import gpu_peak, peak_flops
from tokenizer.train import TokenizerTask

CUDA = torch.device("cuda")


@pytest.fixture
def a100(monkeypatch):
    """A GPU by name alone, and torch's own settings after the test."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    conv = torch.backends.cudnn.conv.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = "none", conv


def test_a_run_in_fp32_is_held_against_the_peak_of_fp32_and_one_in_bf16_against_that_of_bf16(a100):
    assert peak_flops(CUDA, "bf16") == 312e12 and peak_flops(CUDA, "fp32") == 19.5e12


@pytest.mark.parametrize("allow", [
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")])
def test_where_products_may_round_to_tf32_that_is_the_peak(a100, allow):
    allow()
    assert peak_flops(CUDA, "fp32") == 156e12 and peak_flops(CUDA, "bf16") == 312e12


def test_convolutions_have_a_setting_of_their_own_which_torch_has_at_tf32(a100):
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert peak_flops(CUDA, "fp32", TokenizerTask.operation) == 156e12
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert peak_flops(CUDA, "fp32", TokenizerTask.operation) == 19.5e12
    assert GeneratorTask.operation == "matmul"


@pytest.mark.parametrize("name, bf16", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA GH200 480GB", 989e12), ("NVIDIA L40S", 362e12), ("NVIDIA L40", 181e12), ("NVIDIA A40", 150e12),
    ("NVIDIA GeForce RTX 4090", 165e12), ("AMD Instinct MI300X", 1307e12),
    ("NVIDIA RTX A4000", None), ("NVIDIA RTX A1000", None), ("Tesla T4", None)])
def test_a_gpu_is_known_by_the_words_of_its_name(name, bf16):
    assert gpu_peak(name, "bf16") == bf16


def test_no_precision_is_faster_than_a_shorter_one():
    assert all(bf16 >= tf32 >= fp32 for _, bf16, tf32, fp32 in hardware.GPU_PEAKS)


@pytest.mark.parametrize("seconds, sizes", [(1e-3, [256] * 5 + [1024] * 5), (3.0, [256])])
def test_a_cpu_is_measured_in_the_runs_own_precision_for_a_fifth_of_a_second(monkeypatch, seconds, sizes):
    made, clock = [], count(step=seconds)  # each look at the clock is one step later
    monkeypatch.setattr(torch, "ones", lambda *size, dtype: made.append((size, dtype)) or torch.zeros(2, 2))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        made.clear()
        assert peak_flops(torch.device("cpu"), precision) == pytest.approx(2 * sizes[-1]**3 / seconds)
        assert made[:len(sizes)] == [((size, size), dtype) for size in sizes]
