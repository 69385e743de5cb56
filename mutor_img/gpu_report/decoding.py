"""Checks of decoding: the codes are those that they should be, and on a GPU every step is a CUDA graph's replay."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mutor_img.blocks import ModelConfig
from mutor_img.common.streams import Stream, uniform
from mutor_img.decoding.drafting import Draft
from mutor_img.decoding.sampler import Sampler, SamplingSettings, generate
from mutor_img.gpu_report.place import CheckFailed, Place, dtype_of
from mutor_img.pretraining.examination import HEADS
from mutor_img.pretraining.parity import FLOORS, PLAIN_FACTOR, draw_at_scale_one
from mutor_img.transformer import Transformer

GRID = (8, 8)
WINDOW = 4  # of drafts


def check_decoding(place: Place, cfg_scale: float, precision: str) -> str:
    """Cached decoding, with the likeliest code each time, against whole passes over the codes that it gave.

    A code may be less likely than the likeliest by what rounding explains: twice three times the largest error of the
    uncached logits in the same precision, and a share of the largest logit beside that.
    """
    model, exact = small_models(place, precision)
    labels = torch.arange(4)
    with count_graphs() as graphs:
        codes = generate(model, labels, cfg_scale=cfg_scale, top_k=1)
        graphs["replays"] = 0  # it compiled, warmed up and recorded
        again = generate(model, labels, cfg_scale=cfg_scale, top_k=1)
    if not torch.equal(again, codes):
        raise CheckFailed(f"{(again != codes).any(1).sum().item()} of {len(labels)} sequences come out differently the "
                          "second time")
    true, plain = (guided_logits(m, labels.to(place.device), codes, cfg_scale) for m in (exact, model))  # (B, N, V)
    allowed = 2 * (PLAIN_FACTOR * (plain - true).abs().max() + FLOORS[precision] * true.abs().max()).item()
    lacking = true.amax(-1) - true.gather(-1, codes[..., None])[..., 0]  # (B, N), 0 where the likeliest was taken
    wrong = (~(lacking <= allowed)).any(1).sum().item()
    if wrong:
        raise CheckFailed(f"{wrong} of {len(labels)} sequences hold codes that are not the likeliest: their logits "
                          f"lack {lacking.max().item():.3g} where {allowed:.3g} is allowed")
    replays = expect_graphs(place, graphs, model.config.length - 1)
    worst = lacking.max().item() / allowed
    return (f"{len(labels)} sequences of {model.config.length} codes, the worst at {worst:.2f} of what rounding allows"
            + replays)


def check_drafts(place: Place, source: str, precision: str, cfg_scale: float = 2.0, count: int = 64) -> str:
    """Codes sampled with a window of drafts, each against the share of it that whole passes over the codes give.

    The random number of a code may lie outside the code's share by what rounding explains: three times the largest
    error of the uncached sums of probabilities in the same precision, and a share of their total beside that. So a code
    other than that of sequential decoding passes only if its number lies near the edge between the two. How many images
    differ is counted, no more: all codes after the first that differs may.
    """
    model, exact = small_models(place, precision)
    labels, settings = torch.arange(count) % model.config.classes, SamplingSettings(cfg_scale)
    sampler = Sampler(model, settings, count, draft=Draft(WINDOW, source))
    with count_graphs() as graphs:
        sampler.generate(labels, torch.arange(count))
        graphs["replays"] = 0  # it compiled, warmed up and recorded
        codes = sampler.generate(labels, torch.arange(count))  # (B, N); its drafts are others: images are known
    on_device = labels.to(place.device)
    true, plain = (guided_logits(m, on_device, codes, cfg_scale).softmax(-1).cumsum(-1) for m in (exact, model))
    allowed = (PLAIN_FACTOR * (plain - true).abs().max() + FLOORS[precision]).item()
    places = torch.arange(model.config.length, device=place.device)
    numbers = uniform(settings.seed, Stream.TOKEN, torch.arange(count, device=place.device)[:, None], places)  # (B, N)
    above = true.gather(-1, codes[..., None])[..., 0]  # (B, N), the end of the code's share
    below = above - true.diff(dim=-1, prepend=torch.zeros_like(true[..., :1])).gather(-1, codes[..., None])[..., 0]
    outside = torch.maximum(below - numbers, numbers - above)
    wrong = (~(outside <= allowed)).any(1).sum().item()
    if wrong:
        raise CheckFailed(f"{wrong} of {count} sequences hold codes that were not drawn: their random number lies "
                          f"{outside.max().item():.3g} outside of the code's share where {allowed:.3g} is allowed")
    passes = sampler.drafter.passes
    replays = expect_graphs(place, graphs, int(passes.max()))
    differ = (codes != generate(model, labels, cfg_scale=cfg_scale)).any(1).sum().item()
    worst, mean = max(0.0, outside.max().item()) / allowed, passes.double().mean().item()
    return (f"{count} sequences of {model.config.length} codes in {mean:.1f} passes each, the worst at {worst:.2f} of "
            f"what rounding allows; {differ} differ from sequential decoding{replays}")


def small_models(place: Place, precision: str) -> tuple[Transformer, Transformer]:
    """Return a model of two layers with one embedding for all registers, in that precision and in float64."""
    config = ModelConfig(2, HEADS, HEADS * 64, GRID, vocabulary=64, classes=10, dropout=0.0, register_offsets=())
    exact = draw_at_scale_one(Transformer(config), seed=0).to(place.device).eval()
    return copy.deepcopy(exact).to(dtype_of(precision)), exact.double()


def guided_logits(model: Transformer, labels: Tensor, codes: Tensor, scale: float) -> Tensor:
    """Return guided logits (B, N, V) float64 of whole, uncached passes over codes (B, N)."""
    with torch.no_grad():
        logits, unconditional = (model(rows, codes[:, :-1]).double()
                                 for rows in (labels, torch.full_like(labels, model.config.classes)))
    return unconditional + scale * (logits - unconditional)


@contextmanager
def count_graphs() -> Iterator[dict[str, int]]:
    """Count the replays of CUDA graphs in here, and those that the compiler was asked for and gave up."""
    found, before = {"replays": 0, "skips": 0}, counters["inductor"]["cudagraph_skips"]
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        found["replays"] += 1
        replay(graph)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", counted):
        yield found
    found["skips"] = counters["inductor"]["cudagraph_skips"] - before


def expect_graphs(place: Place, graphs: dict[str, int], steps: int) -> str:
    """Return the replays in words, for the end of a line; raises :class:`CheckFailed` unless ``steps`` are replays.

    Where no graphs are expected, there is nothing to say.
    """
    if not place.on_gpu:
        return ""
    faults = []
    if graphs["skips"]:
        faults.append(f"the compiler skipped CUDA graphs {graphs['skips']} times (torch's counter cudagraph_skips; "
                      "TORCH_LOGS=cudagraphs says why)")
    if graphs["replays"] < steps:
        faults.append(f"CUDA graphs were replayed {graphs['replays']} times for {steps} steps")
    if faults:
        raise CheckFailed("\n".join(faults))
    return f"; {graphs['replays']} graph replays, none skipped"
