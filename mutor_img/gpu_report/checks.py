"""The table of checks: a name for each, and the function and sizes behind it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from mutor_img.blocks import LLAMAGEN_PRESETS
from mutor_img.decoding.drafting import SOURCES
from mutor_img.gpu_report.attention import check_flex, check_one_mask, check_sdpa
from mutor_img.gpu_report.decoding import check_decoding, check_drafts
from mutor_img.gpu_report.images import (
    check_decode,
    check_encode,
    check_features,
    check_lpips,
    check_scores,
    check_tokenizer_step,
)
from mutor_img.gpu_report.place import Place
from mutor_img.gpu_report.runs import check_resume, check_run, check_tokenizer_resume
from mutor_img.gpu_report.training import (
    check_dropout,
    check_dropout_gradient,
    check_ema,
    check_group,
    check_training_step,
    measure_update,
)
from mutor_img.registers import RegisterLaw

Check = Callable[[Place], str]

GRID = (16, 16)
HEAD_DIMS = sorted({dim // heads for _, heads, dim in LLAMAGEN_PRESETS.values()})
LAWS = {f"{kind} {name}": RegisterLaw(kind, GRID, 4, **switches) for kind in ("1d", "2d") for name, switches in {
    "dense": {}, "sparse": {"count": 80}, "every 2": {"every": 2}, "mixed": {"count": 80, "mixed": True}}.items()}
PLAIN = RegisterLaw("none", GRID)
PRECISIONS = ("bf16", "fp32")
CHUNK = 100  # rows of logits at a time: no divisor of what a batch has


def all_checks(quick: bool = False, batch: int = 32) -> dict[str, Check]:
    """Return every check by name.

    Args:
        quick: of attention alone, only the laws of the paper's two image rows.
        batch: sequences in a measured update of B.
    """
    laws = {name: law for name, law in LAWS.items() if not quick or name in ("2d dense", "2d sparse")}
    # Side by side, what takes longest begins first.
    return {**other_checks(), **training_checks(), **attention_checks(laws), **measurements(batch)}


def attention_checks(laws: dict[str, RegisterLaw]) -> dict[str, Check]:
    """Return the checks of attention with these laws' masks."""
    checks: dict[str, Check] = {}
    for precision in PRECISIONS:
        for head_dim in HEAD_DIMS:
            given = {"head_dim": head_dim, "precision": precision}
            for name, law in laws.items():
                checks[f"flex, {name}, head {head_dim}, {precision}"] = partial(check_flex, law=law, **given)
            for name, law in {"no registers": PLAIN, **laws}.items():
                for how in ("eager", "compiled"):
                    checks[f"sdpa, {name}, head {head_dim}, {precision}, {how}"] = partial(
                        check_sdpa, law=law, compiled=how == "compiled", **given)
    for name in ("2d dense", "2d sparse"):
        checks[f"one mask for ten draws, {name}"] = partial(check_one_mask, law=LAWS[name])
    return checks


def training_checks() -> dict[str, Check]:
    """Return the checks of a generator's training."""
    checks: dict[str, Check] = {}
    sparse, dense = LAWS["2d sparse"], LAWS["2d dense"]
    for precision in PRECISIONS:
        for name, law, head_dim in (("none", PLAIN, 64), ("2d dense", dense, 64), ("2d sparse", sparse, 64),
                                    ("2d sparse", sparse, 100)):
            checks[f"training step, {name}, head {head_dim}, {precision}"] = partial(
                check_training_step, law=law, head_dim=head_dim, precision=precision)
        for how, switches in (("checkpointed", {"checkpointing": True}), ("chunked loss", {"loss_chunk": CHUNK}),
                              ("checkpointed, chunked loss", {"checkpointing": True, "loss_chunk": CHUNK})):
            checks[f"training step, 2d sparse, head 64, {precision}, {how}"] = partial(
                check_training_step, law=sparse, head_dim=64, precision=precision, **switches)
        checks[f"dropout, masks, {precision}"] = partial(check_dropout, precision=precision)
        for name, wrapper, checkpointing in (("DDP", "ddp", False), ("FSDP2", "fsdp", False),
                                             ("FSDP2, checkpointed", "fsdp", True)):
            checks[f"group of one process, {name}, {precision}"] = partial(
                check_group, law=sparse, wrapper=wrapper, precision=precision, checkpointing=checkpointing)
    checks["dropout, gradient"] = partial(check_dropout_gradient, law=sparse, checkpointing=False)
    checks["dropout, gradient, checkpointed"] = partial(check_dropout_gradient, law=sparse, checkpointing=True)
    checks["averaged weights"] = partial(check_ema, law=sparse)
    for name, law in (("none", PLAIN), ("2d dense", dense), ("2d sparse", sparse)):
        checks[f"resume, {name}, bf16"] = partial(check_resume, law=law, precision="bf16")
    checks["resume, 2d sparse, bf16, checkpointed"] = partial(
        check_resume, law=sparse, precision="bf16", checkpointing=True)
    return checks


def other_checks() -> dict[str, Check]:
    """Return the checks of decoding, of the tokenizer, of scores, and of a run from images to scores."""
    checks: dict[str, Check] = {}
    for precision in PRECISIONS:
        checks[f"tokenizer, training step, {precision}"] = partial(check_tokenizer_step, precision=precision)
        checks[f"tokenizer, resume, {precision}"] = partial(check_tokenizer_resume, precision=precision)
    checks["a run, images to scores"] = partial(check_run, law=RegisterLaw("2d", (8, 8), 4, 20))
    for precision in PRECISIONS:
        for name, scale in (("no guidance", 1.0), ("guidance 2", 2.0)):
            checks[f"decoding, {name}, {precision}"] = partial(check_decoding, cfg_scale=scale, precision=precision)
        for source in SOURCES:
            checks[f"drafts, {source}, {precision}"] = partial(check_drafts, source=source, precision=precision)
        checks[f"tokenizer, LPIPS, {precision}"] = partial(check_lpips, precision=precision)
    checks["tokenizer, encode"] = partial(check_encode)
    checks["tokenizer, decode"] = partial(check_decode)
    for network in ("inception", "mnist"):
        checks[f"features, {network}"] = partial(check_features, network=network)
    checks["scores"] = partial(check_scores)
    return checks


def measurements(batch: int) -> dict[str, Check]:
    """Return the measured updates of B: next-token, 256 and 80 registers, and 256 checkpointed."""
    dense = LAWS["2d dense"]
    measured = {"next-token": (PLAIN, False), "256 registers": (dense, False),
                "80 registers": (LAWS["2d sparse"], False), "256 registers, checkpointed": (dense, True)}
    return {f"update of B, bf16, {name}": partial(measure_update, law=law, checkpointing=checkpointing, batch=batch)
            for name, (law, checkpointing) in measured.items()}
