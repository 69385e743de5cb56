"""Decoding's checks count the replays of CUDA graphs, here graphs that do nothing."""

from functools import partial

import pytest
import torch
from bodies import CPU, wrap

from mutor_img.gpu_report import decoding
from mutor_img.gpu_report.place import CheckFailed, Place

pytestmark = pytest.mark.usefixtures("usual_limits", "uncompiled")


class GraphsExpected(Place):
    """A CPU of which CUDA graphs are expected."""

    on_gpu = True


def replaying(monkeypatch, replays):
    """Have decoding replay so many graphs that do nothing."""
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: None)

    def around(right, *given, **options):
        for _ in range(replays):
            torch.cuda.CUDAGraph.replay(None)
        return right(*given, **options)

    wrap(monkeypatch, decoding, "generate", around)


@pytest.mark.parametrize("replays, says", [(0, "replayed 0 times for 63"), (62, "replayed 62 times for 63"), (63, "")])
def test_each_token_but_the_first_must_be_a_replay(replays, says, monkeypatch):
    replaying(monkeypatch, replays)
    check = partial(decoding.check_decoding, GraphsExpected(CPU.device, CPU.backend), 1.0, "fp32")
    if not says:
        assert "63 graph replays, none skipped" in check()
        return
    with pytest.raises(CheckFailed, match=says):
        check()


def test_each_pass_of_drafts_must_be_a_replay(monkeypatch):
    replaying(monkeypatch, 0)
    with pytest.raises(CheckFailed, match=r"replayed 0 times for \d\d steps"):
        decoding.check_drafts(GraphsExpected(CPU.device, CPU.backend), "window", "fp32", count=1)


def test_a_graph_that_the_compiler_skips_is_a_fault(monkeypatch):
    """torch counts the skip itself: a CPU has no CUDA graphs, and a step that asks for one is skipped silently."""
    replaying(monkeypatch, 63)
    step = torch.compile(lambda x: x @ x, mode="reduce-overhead")  # a library's product: no kernel to be compiled
    wrap(monkeypatch, decoding, "generate", lambda right, *given, **options: (
        step(torch.ones(3, 3)), right(*given, **options))[1])
    with torch._inductor.config.patch(force_disable_caches=True), pytest.raises(
            CheckFailed, match=r"skipped CUDA graphs \d+ times"):
        decoding.check_decoding(GraphsExpected(CPU.device, CPU.backend), 1.0, "fp32")
