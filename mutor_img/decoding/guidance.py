"""Classifier-free guidance: how strongly each token of an image is pushed towards its class.

A schedule is a list of N scales, one per token. A scale of 1 means the conditional logits as they are; above 1 the
logits are ``uncond + s (cond - uncond)`` (LlamaGen, arXiv 2406.06525; the paper's images use a constant 2.0).
"""

from __future__ import annotations

import math

from torch import Tensor

from mutor_img.common.errors import UserError, check_choice

SCHEDULES = ("constant", "interval", "linear", "power-cosine")
_PARAMETERS = {  # what a schedule's one number means
    "interval": "n, a whole number >= 0: the first n + 2 tokens are guided",
    "power-cosine": "the power, > 0; above 1, guidance rises later",
}


def parse_schedule(text: str) -> tuple[str, float | None]:
    """Return the name and the parameter, or None, of a schedule in one word: ``linear``, ``power-cosine:2``.

    Raises:
        UserError: an unknown name, or a parameter that is no number, missing, out of range, or of no use.
    """
    name, colon, number = text.partition(":")
    try:
        parameter = float(number) if colon else None
    except ValueError:
        raise UserError(f"schedule {text!r}: {number!r} is not a number; write it as in power-cosine:2") from None
    guidance_scales(name, 1.0, parameter, 1)
    return name, parameter


def schedule_text(name: str, parameter: float | None) -> str:
    """Return what :func:`parse_schedule` reads."""
    return name if parameter is None else f"{name}:{parameter}"


def guidance_scales(schedule: str, scale: float, parameter: float | None, length: int) -> list[float]:
    """Return the guidance scale of each of ``length`` tokens, all >= 1.

    ============  ===========================================================================================
    constant      ``scale`` for every token
    interval      ``scale`` for the first n + 2 tokens (LlamaGen's prefill and decode steps 0 .. n), then 1
    linear        from 1 for the first token to ``scale`` for the last (Muse, arXiv 2301.00704)
    power-cosine  ``1 + (scale - 1) (1 - cos(pi r**power)) / 2`` with r from 0 to 1 (MDTv2, arXiv 2303.14389)
    ============  ===========================================================================================

    Args:
        schedule: one of the names above.
        scale: the largest scale, >= 1.
        parameter: n of ``interval``, the power of ``power-cosine``; None for the others.
        length: N.

    Raises:
        UserError: an unknown schedule, or a parameter that is missing, out of range, or of no use.
    """
    check_choice("cfg-schedule", schedule, SCHEDULES)
    if (parameter is not None) != (schedule in _PARAMETERS):
        raise UserError(f"cfg-schedule {schedule} needs cfg-parameter, {_PARAMETERS[schedule]}; give --cfg-parameter, "
                        f"or in a list a number after a colon, as in {schedule}:2" if parameter is None else
                        f"cfg-schedule {schedule} takes no cfg-parameter; leave it out")
    if schedule == "constant":
        return [scale] * length
    if schedule == "interval":
        if not (-1 < parameter < math.inf and parameter == int(parameter)):
            raise UserError(f"cfg-parameter is {parameter}; interval needs a whole number >= 0")
        guided = int(parameter) + 2
        return [scale if token < guided else 1.0 for token in range(length)]
    done = [token / max(1, length - 1) for token in range(length)]  # r, from 0 to 1
    if schedule == "linear":
        return [1.0 + (scale - 1.0) * r for r in done]
    if not 0 < parameter < math.inf:
        raise UserError(f"cfg-parameter is {parameter}; power-cosine needs a finite power > 0")
    return [1.0 + (scale - 1.0) * (1.0 - math.cos(math.pi * r**parameter)) / 2.0 for r in done]


def guide(logits: Tensor, scale: float | Tensor) -> Tensor:
    """Combine logits (2 B, .., V), conditional rows first, into (B, .., V); any floating dtype.

    ``scale`` may be a tensor that broadcasts to them: a scale for each row.
    """
    conditional, unconditional = logits.chunk(2)  # (B, .., V) each
    return (conditional - unconditional).mul_(scale).add_(unconditional)  # one large temporary, not three
