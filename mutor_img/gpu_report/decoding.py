"""Checks of decoding: the codes are the likeliest ones, and on a GPU every token is a CUDA graph's replay."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mutor_img.blocks import ModelConfig
from mutor_img.decoding.sampler import generate
from mutor_img.gpu_report.place import CheckFailed, Place, dtype_of
from mutor_img.pretraining.examination import HEADS
from mutor_img.pretraining.parity import FLOORS, PLAIN_FACTOR, draw_at_scale_one
from mutor_img.transformer import Transformer

GRID = (8, 8)


def check_decoding(place: Place, cfg_scale: float, precision: str) -> str:
    """Cached decoding, with the likeliest code each time, against whole passes over the codes that it gave.

    A code may be less likely than the likeliest by what rounding explains: twice three times the largest error of the
    uncached logits in the same precision, and a share of the largest logit beside that.
    """
    config = ModelConfig(2, HEADS, HEADS * 64, GRID, vocabulary=64, classes=10, dropout=0.0)
    exact = draw_at_scale_one(Transformer(config), seed=0).to(place.device).eval()
    model = copy.deepcopy(exact).to(dtype_of(precision))
    labels = torch.arange(4)
    with count_graphs() as graphs:
        codes = generate(model, labels, cfg_scale=cfg_scale, top_k=1)
        graphs["replays"] = 0  # it compiled, warmed up and recorded
        again = generate(model, labels, cfg_scale=cfg_scale, top_k=1)
    if not torch.equal(again, codes):
        raise CheckFailed(f"{(again != codes).any(1).sum().item()} of {len(labels)} sequences come out differently the "
                          "second time")
    exact.double()
    true, plain = (guided_logits(m, labels.to(place.device), codes, cfg_scale) for m in (exact, model))  # (B, N, V)
    allowed = 2 * (PLAIN_FACTOR * (plain - true).abs().max() + FLOORS[precision] * true.abs().max()).item()
    lacking = true.amax(-1) - true.gather(-1, codes[..., None])[..., 0]  # (B, N), 0 where the likeliest was taken
    wrong = (~(lacking <= allowed)).any(1).sum().item()
    if wrong:
        raise CheckFailed(f"{wrong} of {len(labels)} sequences hold codes that are not the likeliest: their logits "
                          f"lack {lacking.max().item():.3g} where {allowed:.3g} is allowed")
    faults = graphs_wanting(graphs, config.length - 1) if place.graphs else []
    if faults:
        raise CheckFailed("\n".join(faults))
    worst = lacking.max().item() / allowed
    return (f"{len(labels)} sequences of {config.length} codes, the worst at {worst:.2f} of what rounding allows"
            + (f"; {graphs['replays']} graph replays, none skipped" if place.graphs else ""))


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


def graphs_wanting(graphs: dict[str, int], tokens: int) -> list[str]:
    """Return what is wrong with the counts of one image's ``tokens`` cached steps, a line each."""
    faults = []
    if graphs["skips"]:
        faults.append(f"the compiler skipped CUDA graphs {graphs['skips']} times (torch's counter cudagraph_skips; "
                      "TORCH_LOGS=cudagraphs says why)")
    if graphs["replays"] < tokens:
        faults.append(f"CUDA graphs were replayed {graphs['replays']} times for {tokens} tokens")
    return faults
