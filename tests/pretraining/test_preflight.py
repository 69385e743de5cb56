"""The comparison before training: it passes honest rounding, and notices each way in which a backend can be wrong."""

import json
import math
import sys
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from launching import join, launch

from mutor_img import transformer
from mutor_img.attention import FlexAttention
from mutor_img.blocks import ModelConfig
from mutor_img.checkpoints.folder import find_checkpoint, read_meta
from mutor_img.common.files import read_metrics
from mutor_img.pretraining import preflight as module
from mutor_img.pretraining import task as generator
from mutor_img.pretraining.examination import Findings, Subject, examine
from mutor_img.pretraining.parity import Difference, compare_attention, dense_mask, exact_attention
from mutor_img.pretraining.preflight import examine_apart, preflight
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.registers import RegisterLaw
from mutor_img.training.runtime import Runtime

SPARSE, DENSE = RegisterLaw("2d", (8, 8), 4, 20), RegisterLaw("2d", (8, 8), 4)
CPU = Runtime(torch.device("cpu"))


class Dense:
    """A stand-in for FlexAttention that has a backward on CPUs: SDPA with the whole mask."""

    def __init__(self, length, anchors, fixed_anchors):
        self.length, self.anchors = length, anchors

    def update(self, anchors):
        self.anchors = anchors

    def __call__(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(self.anchors, self.length))


class OneAnchorTooFar(Dense):
    def update(self, anchors):
        self.anchors = anchors.clone()
        self.anchors[1, 3] += 1


class FirstDrawForever(Dense):
    def update(self, anchors):
        pass


class NotANumber(Dense):
    def __call__(self, q, k, v):
        return super().__call__(q, k, v).index_fill(2, torch.tensor([70]), math.nan)


class Raises(Dense):
    def __call__(self, q, k, v):
        raise RuntimeError("out of resource: shared memory\nRequired: 1")


class RaisesWhenBuilt(Dense):
    def __init__(self, length, anchors, fixed_anchors):
        raise NotImplementedError("no mask on this device")


class WrongGradient(Dense):
    def __call__(self, q, k, v):
        k = k.clone()
        k.register_hook(lambda gradient: gradient * 1.1)
        return super().__call__(q, k, v)


class GradientMissesABlock(Dense):
    def __call__(self, q, k, v):
        v = v.clone()
        v.register_hook(lambda gradient: gradient.index_fill(2, torch.tensor([64]), 0.0))
        return super().__call__(q, k, v)


class MisreadsStrides(Dense):
    """As compiled FlexAttention did on CPUs: right alone, wrong where q, k and v are views of one product."""

    def __call__(self, q, k, v):
        if v.is_contiguous():
            return super().__call__(q, k, v)
        return super().__call__(q, k, v.flatten().roll(64).view_as(v))


def examined_here(backend):
    """Examine a stand-in in this process, uncompiled."""
    return lambda subject, seconds: examine(subject, backend, compiled=lambda function: function)


def run(backend, law=SPARSE, precision="fp32", head_dim=16, runtime=CPU):
    return preflight(law, ModelConfig(1, 4, 4 * head_dim, law.grid), precision, 0, runtime,
                     examined=examined_here(backend))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("law", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_a_right_backend_passes_with_outputs_and_gradients_compared(law, precision):
    result = run(Dense, law, precision)
    assert result.passed and not result.failures
    assert "is right for" in result.describe() and precision in result.describe()
    draws = 4 if law is SPARSE else 2
    assert len(result.findings.differences) == draws * (4 + 4)
    tensors = {d.tensor for _, d in result.findings.differences}
    assert tensors >= {"output", "gradient of q", "gradient of k", "gradient of v"}
    assert json.loads(json.dumps(result.to_json()))["attention"] == "flex"


BROKEN = {
    OneAnchorTooFar: "output differs by", FirstDrawForever: "update 1: output", NotANumber: "output differs by nan",
    Raises: "RuntimeError: out of resource: shared memory", RaisesWhenBuilt: "no mask on this device",
    WrongGradient: "gradient of k", GradientMissesABlock: "gradient of v", MisreadsStrides: "in a compiled block"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", BROKEN, ids=lambda backend: backend.__name__)
def test_a_broken_backend_fails_and_what_differs_is_named(backend, precision):
    result = run(backend, precision=precision)
    assert not result.passed and any(BROKEN[backend] in line for line in result.failures)
    text = result.describe()
    assert "FAILED" in text and "scaled_dot_product_attention" in text and len(text.splitlines()) <= 8
    assert json.loads(json.dumps(result.to_json()))["attention"] == "sdpa"


def test_a_wrong_gradient_leaves_the_outputs_right():
    found = run(WrongGradient).findings.differences
    failed = {d.tensor for draw, d in found if not d.passed and "block" not in draw}
    assert failed == {"gradient of k"}


def test_a_failure_on_another_process_counts_here_too():
    class Two(Runtime):
        def sum(self, values):
            return values + 1.0  # the other process saw a failure

    result = run(Dense, runtime=Two(torch.device("cpu")))
    assert not result.failures and not result.passed
    assert "failed on 1 other process" in result.describe() and result.to_json()["failed_ranks"] == 1


def test_the_preflight_leaves_the_random_stream_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    run(Dense)
    assert torch.equal(torch.rand(4), expected)


# ---- the exact side and its bound


def test_exact_attention_has_the_outputs_and_gradients_of_autograd():
    anchors = SPARSE.draw(0, 0, torch.arange(2))[0]
    mask = dense_mask(anchors, 64)
    q, k, v, upstream = torch.randn(4, 2, 2, 84, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
    exact = exact_attention(q, k, v, upstream, mask, 2.0**-8)
    for found, (value, bound) in zip((out, *torch.autograd.grad(out, leaves, upstream)), exact.values(), strict=True):
        torch.testing.assert_close(found, value, atol=1e-12, rtol=0)
        assert (bound > 0).all() and bound.median() < 0.1 * value.abs().max()


@pytest.mark.parametrize("dtype, margin", [(torch.bfloat16, 1.0), (torch.float32, 0.3)])
def test_the_bound_covers_rounded_attention_and_is_no_more_than_twenty_times_as_wide(dtype, margin):
    """Rounding as a fused kernel rounds: probabilities, their gradient and every output in the dtype, sums in fp32."""
    anchors = SPARSE.draw(0, 0, torch.arange(2))[0]
    mask = dense_mask(anchors, 64)

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            scores = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
            p = scores.softmax(-1)
            out = (p.to(dtype).float() @ v.float()).to(dtype)
            ctx.save_for_backward(q, k, v, p, out)
            return out

        @staticmethod
        def backward(ctx, upstream):
            q, k, v, p, out = (x.float() for x in ctx.saved_tensors)
            row = (upstream.float() * out).sum(-1, keepdim=True).to(dtype).float()
            d_scores = (p * (upstream.float() @ v.mT - row)).to(dtype).float() * q.shape[-1] ** -0.5
            return ((d_scores @ k).to(dtype), (d_scores.mT @ q).to(dtype),
                    (p.to(dtype).float().mT @ upstream.float()).to(dtype))

    found = compare_attention(Rounded.apply, anchors, 64, heads=2, head_dim=16, dtype=dtype, seed=1)
    assert all(d.passed and d.error < margin * d.allowed for d in found)
    if dtype == torch.bfloat16:
        assert all(d.error > d.allowed / 20 for d in found)


# ---- the real backend, compiled, as far as a CPU goes


def test_compiled_flex_attention_passes_at_the_head_dimension_of_3b_in_outputs():
    """In a process of its own, one mask and one compilation for four draws, alone and in a compiled block.

    CPUs have no backward.
    """
    law = RegisterLaw("2d", (10, 10), 4, 60)  # 160 positions: no multiple of the kernel's block
    result = preflight(law, ModelConfig(1, 32, 3200, law.grid), "fp32", 0, CPU, gradients=False)
    assert result.passed, result.describe()
    assert len(result.findings.differences) == 8 and "head dimension 100" in result.subject


# ---- the process that examines, and what becomes of it


def child(code):
    """A stand-in for the examining process, which reads its question and does ``code``."""
    return [sys.executable, "-c", f"import os, sys, time; sys.stdin.readline(); {code}"]


def says(answer):
    return f"os.write(int(sys.argv[-1]), {answer!r})"


DEATHS = {
    "os._exit(139)": "ended with status 139", "os.kill(os.getpid(), 9)": "ended by SIGKILL",
    "os.kill(os.getpid(), 11)": "ended by SIGSEGV", "time.sleep(600)": "gave no answer within 2 s",
    "raise RuntimeError('CUDA error: an illegal memory access')": "RuntimeError: CUDA error: an illegal memory access",
    says(b"\x00\xff garbage\n"): "not JSON", says(b'{"differences": [["update 0"'): "ended with status 0",
    says(b"[1, 2]\n"): "gave no findings",
    says(b'{"differences": [], "error": null, "log": ""}\n'): "compared nothing",
}


@pytest.mark.parametrize("code", DEATHS)
def test_whatever_becomes_of_the_examining_process_is_a_failure_that_says_so(code):
    result = preflight(SPARSE, ModelConfig(1, 4, 64, SPARSE.grid), "fp32", 0, CPU,
                       examined=lambda subject, seconds: examine_apart(subject, 2.0, child(code)))
    assert not result.passed and DEATHS[code] in result.failures[0]
    assert "warning" in result.describe() and DEATHS[code] in result.describe()
    assert json.loads(json.dumps(result.to_json()))["attention"] == "sdpa"


def test_a_process_that_cannot_be_started_is_a_failure_too():
    found = examine_apart(Subject(SPARSE, 16, "fp32", 0, "cpu"), 2.0, ["/absent/python"])
    assert "absent" in found.error


def test_question_and_findings_survive_their_trip_through_json():
    for law in (SPARSE, DENSE, RegisterLaw("1d", (4, 5), 3, every=2), RegisterLaw("2d", (4, 5), 3, 6, mixed=True)):
        subject = Subject(law, 100, "bf16", 7, "cuda:3", True, "tf32")
        assert Subject.from_json(json.loads(json.dumps(subject.to_json()))) == subject
    found = examine(Subject(SPARSE, 16, "fp32", 0, "cpu"), NotANumber, lambda function: function)
    again = Findings.from_json(json.loads(json.dumps(found.to_json())))
    assert str(again) == str(found) and any(math.isnan(d.error) for _, d in again.differences)


def test_each_process_has_its_own_device_examined_and_gives_up_before_the_others_take_it_for_dead(monkeypatch):
    asked = []

    class Third(Runtime):
        def sum(self, values):
            return values

    monkeypatch.setattr(module.torch, "tensor", lambda values, device: torch.as_tensor(values))
    for runtime in (Third(torch.device("cuda:3"), 3, 4, timedelta(minutes=2)), Third(torch.device("cuda:0"))):
        preflight(SPARSE, ModelConfig(1, 4, 64, SPARSE.grid), "bf16", 0, runtime,
                  examined=lambda *given: asked.append(given) or Findings([], "no such device"))
    assert [(subject.device, seconds) for subject, seconds in asked] == [("cuda:3", 60.0), ("cuda:0", module.SECONDS)]


def test_flex_attention_refuses_to_run_uncompiled():
    flex = FlexAttention(64, torch.zeros(1, 20, dtype=torch.int64), fixed_anchors=False)
    with pytest.raises(RuntimeError, match="must run compiled"):
        flex(*torch.zeros(3, 1, 1, 84, 16))


def one_of_two(rank, world, port, root):
    """A process of a launch whose second one's examining process crashes."""
    join(rank, world, port)
    right = Findings([("update 0", Difference("output", 0.1, 1.0))]).to_json()
    answer = f"assert 'RANK' not in os.environ; {says(json.dumps(right).encode() + bytes([10]))}"
    runtime = Runtime.start(2)
    result = preflight(SPARSE, ModelConfig(1, 4, 64, SPARSE.grid), "fp32", 0, runtime, examined=partial(
        examine_apart, command=child("os._exit(139)" if rank else answer)))
    (root / f"{rank}.json").write_text(json.dumps(result.to_json()))
    runtime.leave()


def test_a_crash_beside_one_process_is_the_verdict_of_all(processes, tmp_path):
    assert launch(processes, 2, one_of_two, tmp_path) == [0, 0]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one["attention"] for one in found] == ["sdpa", "sdpa"] and [one["failed_ranks"] for one in found] == [1, 1]
    assert found[0]["failures"] == [] and "status 139" in found[1]["failures"][0]


# ---- in a run


@pytest.fixture
def run_with_flex(run_training, monkeypatch):
    """Train the small run as on a GPU, where it would use the given stand-in for FlexAttention."""

    def run(backend, examined=None):
        monkeypatch.setattr(GeneratorTask, "wants_flex", lambda self, device: True)
        monkeypatch.setattr(generator, "preflight", partial(preflight, examined=examined or examined_here(backend)))
        monkeypatch.setattr(transformer, "FlexAttention", backend)
        return run_training("train.steps=2")

    return run


def test_a_run_uses_a_backend_that_passes_and_its_metadata_say_so(run_with_flex, capsys):
    trainer = run_with_flex(Dense)
    assert isinstance(trainer.model.flex, Dense)
    recorded = read_meta(find_checkpoint(trainer.run_dir))["preflight"]
    assert recorded["attention"] == "flex" and recorded["failures"] == []
    assert recorded == json.loads((trainer.run_dir / "preflight.json").read_text())
    assert capsys.readouterr().out.count("preflight: FlexAttention is right for 6 registers (2d) on 4 x 5 codes") == 1


@pytest.mark.parametrize("backend", [OneAnchorTooFar, Raises, WrongGradient])
def test_a_run_whose_backend_fails_trains_with_sdpa_to_the_same_losses(backend, run_with_flex, run_training, tmp_path,
                                                                              capsys):
    plain = run_training("train.steps=2", f"run_dir={tmp_path}/plain")
    trainer = run_with_flex(backend)
    assert trainer.model.flex is None
    recorded = read_meta(find_checkpoint(trainer.run_dir))["preflight"]
    assert recorded["attention"] == "sdpa" and recorded["failures"]
    assert recorded["failures"][0] in capsys.readouterr().out
    losses = [row["loss"] for row in read_metrics(trainer.run_dir)]
    assert losses == [row["loss"] for row in read_metrics(plain.run_dir)]
    assert "preflight" not in read_meta(find_checkpoint(plain.run_dir))


def test_a_run_whose_examining_process_dies_trains_with_sdpa(run_with_flex, capsys):
    trainer = run_with_flex(Dense, partial(examine_apart, command=child("os._exit(139)")))
    assert trainer.model.flex is None and trainer.step == 2
    recorded = json.loads((trainer.run_dir / "preflight.json").read_text())
    assert recorded["attention"] == "sdpa" and "status 139" in recorded["failures"][0]
    assert "status 139" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_on_a_gpu_passes_the_preflight_and_trains_with_flex_attention(run_training, precision):
    trainer = run_training("train.compile=true", f"train.precision={precision}")
    recorded = read_meta(find_checkpoint(trainer.run_dir))["preflight"]
    assert recorded["failures"] == [] and isinstance(trainer.model.flex, FlexAttention)
    assert trainer.step == 3
