"""Checks of attention: FlexAttention as before each run, the fallback, and one mask for many draws."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from mutor_img.attention import FlexAttention, SdpaAttention
from mutor_img.gpu_report.place import CheckFailed, Place, dtype_of, expect
from mutor_img.pretraining.examination import BATCH, HEADS, Subject, examine
from mutor_img.pretraining.parity import compare_attention
from mutor_img.registers import RegisterLaw


def check_flex(place: Place, law: RegisterLaw, head_dim: int, precision: str) -> str:
    """Compiled FlexAttention against exact attention, alone and in a compiled block, as before each run."""
    subject = Subject(law, head_dim, precision, 0, str(place.device), gradients=place.on_gpu)
    found = examine(subject, FlexAttention, place.compiled)
    if found.error:
        raise CheckFailed(found.error)
    return expect([difference for _, difference in found.differences])


def check_sdpa(place: Place, law: RegisterLaw, head_dim: int, precision: str, compiled: bool) -> str:
    """The backend that runs fall back to, and that next-token prediction uses, against exact attention."""
    anchors = None if law.kind == "none" else law.draw(0, 0, torch.arange(BATCH))[0].to(place.device)
    attend = SdpaAttention(law.length, anchors)
    seen = torch.zeros(BATCH, 0, dtype=torch.int64, device=place.device) if anchors is None else anchors
    run = place.compiled(lambda q, k, v: attend(q, k, v)) if compiled else attend
    return expect(compare_attention(run, seen, law.length, heads=HEADS, head_dim=head_dim, dtype=dtype_of(precision),
                                    seed=0))


def check_one_mask(place: Place, law: RegisterLaw, head_dim: int = 64, draws: int = 10) -> str:
    """One BlockMask and one compilation for many draws of anchors."""
    differences, samples = [], torch.arange(BATCH)
    flex = FlexAttention(law.length, law.draw(0, 0, samples)[0].to(place.device), fixed_anchors=law.count is None)
    run = place.compiled(lambda q, k, v: flex(q, k, v))
    for step in range(draws):
        anchors = law.draw(0, step, samples)[0].to(place.device)
        flex.update(anchors)
        with torch.compiler.set_stance("fail_on_recompile") if step else nullcontext():
            differences += compare_attention(run, anchors, law.length, heads=HEADS, head_dim=head_dim,
                                             dtype=torch.bfloat16, seed=step, gradients=place.on_gpu)
    return f"{draws} draws, compiled once; {expect(differences)}"
