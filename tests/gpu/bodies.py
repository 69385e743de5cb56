"""The GPU checks as a CPU can run them: small, FlexAttention forward only, decoding without graphs, gloo."""

from functools import partial

import torch

from mutor_img.gpu_report import attention, decoding, images, runs, training
from mutor_img.gpu_report.checks import all_checks
from mutor_img.gpu_report.place import Place
from mutor_img.registers import RegisterLaw

CHECKS = all_checks(batch=2)
CPU = Place(torch.device("cpu"), backend="eager")
SMALL, PLAIN, EVEN = RegisterLaw("2d", (4, 5), 3, 6), RegisterLaw("none", (4, 5)), RegisterLaw("2d", (8, 8), 3, 6)

# Traced as torch.compile does it; in the other rehearsals blocks run as they are, since nothing new would be traced.
TRACED = ("training step", "training step, no registers", "training step, checkpointed, chunked loss", "DDP", "FSDP2",
          "resume", "dropout, gradient", "dropout, gradient, checkpointed", "tokenizer step")
BODIES = {
    "flex": partial(attention.check_flex, law=SMALL, head_dim=100, precision="fp32"),
    "sdpa": partial(attention.check_sdpa, law=SMALL, head_dim=100, precision="bf16", compiled=True),
    "sdpa, no registers": partial(attention.check_sdpa, law=PLAIN, head_dim=64, precision="fp32", compiled=False),
    "one mask": partial(attention.check_one_mask, law=SMALL, head_dim=16, draws=3),
    "training step": partial(training.check_training_step, law=SMALL, head_dim=16, precision="bf16"),
    "training step, no registers": partial(training.check_training_step, law=PLAIN, head_dim=16, precision="fp32"),
    "training step, checkpointed, chunked loss": partial(
        training.check_training_step, law=SMALL, head_dim=16, precision="bf16", checkpointing=True, loss_chunk=7),
    "dropout, bf16": partial(training.check_dropout, precision="bf16"),
    "dropout, gradient": partial(training.check_dropout_gradient, law=SMALL, checkpointing=False),
    "dropout, gradient, checkpointed": partial(training.check_dropout_gradient, law=SMALL, checkpointing=True),
    "averaged weights": partial(training.check_ema, law=SMALL),
    "DDP": partial(training.check_group, law=SMALL, wrapper="ddp", precision="bf16"),
    "FSDP2": partial(training.check_group, law=SMALL, wrapper="fsdp", precision="bf16"),
    "FSDP2, checkpointed": partial(training.check_group, law=SMALL, wrapper="fsdp", precision="fp32",
                                   checkpointing=True),
    "resume": partial(runs.check_resume, law=SMALL, precision="bf16"),
    "tokenizer, resume": partial(runs.check_tokenizer_resume, precision="bf16"),
    "run": partial(runs.check_run, law=EVEN),
    "decoding": partial(decoding.check_decoding, cfg_scale=2.0, precision="fp32"),
    "decoding, bf16": partial(decoding.check_decoding, cfg_scale=1.0, precision="bf16"),
    "drafts": partial(decoding.check_drafts, source="registers", precision="fp32", count=4),
    "drafts, bf16": partial(decoding.check_drafts, source="frequency", precision="bf16", count=4),
    "tokenizer step": partial(images.check_tokenizer_step, precision="bf16"),
    "LPIPS": partial(images.check_lpips, precision="fp32", count=1),
    "encode": partial(images.check_encode, count=10),
    "decode": partial(images.check_decode, count=2),
    "inception": partial(images.check_features, network="inception", count=1),
    "digits": partial(images.check_features, network="mnist"),
    "scores": partial(images.check_scores),
    "update": partial(training.measure_update, law=SMALL, preset="mnist", batch=2, rounds=1, vocabulary=32),
}


def wrap(monkeypatch, owner, name, around):
    """Replace ``owner.name`` by ``around(what it was, *given)``."""
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given, **options: around(right, *given, **options))
