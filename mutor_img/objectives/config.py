"""The section ``objective`` of a config, and the objective that it stands for."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields
from typing import Any

from mutor_img.blocks import ModelConfig
from mutor_img.common.errors import UserError, check_choice
from mutor_img.objectives.mirai import Mirai
from mutor_img.objectives.mutor import Mutor
from mutor_img.objectives.next_patch import NextPatch
from mutor_img.objectives.objective import Objective
from mutor_img.objectives.parallel_heads import ParallelHeads
from mutor_img.objectives.rear import Rear
from mutor_img.objectives.sequential_heads import SequentialHeads
from mutor_img.registers import RegisterLaw

KINDS: dict[str, type[Objective]] = {  # beside mutor
    "parallel-heads": ParallelHeads, "sequential-heads": SequentialHeads, "rear": Rear,
    "npp": NextPatch, "mirai": Mirai,
}


@dataclass
class ObjectiveConfig:
    """What the run trains for. A setting that is left out has its kind's own default (docs/objectives.md)."""

    kind: str = "mutor"  # mutor (next-token if registers.kind is none), or another of docs/objectives.md
    weight: float | None = None  # default: parallel-heads (a) 0.1; sequential-heads, rear (lambda) 0.3, 1; mirai (c) 2
    offsets: list[int] = field(default_factory=list)  # raster offsets; default: parallel-heads [2], mirai [0, 1, width]
    tap_from_end: int | None = None  # parallel-heads: how many of the model's last blocks the heads skip; default 1
    blocks: int | None = None  # parallel-heads: blocks of each head; default 1
    own_output: bool | None = None  # parallel-heads: an output matrix for each head; default false: the model's
    depths: int | None = None  # sequential-heads: number of depths; default 1
    late_weight: float | None = None  # weight from update late_from on; default: sequential-heads 0.1; mirai 1
    late_from: int | None = None  # sequential-heads, mirai: see late_weight; null, like that: the weight stays
    tap: int | None = None  # mirai: block whose outputs are compared; default: two thirds of the blocks
    starts_at: int | None = None  # mirai: update at which its losses start; default 0
    noise_until: int | None = None  # rear: update from which inputs have no noise; must be given; 0: no noise at all
    code_dim: int | None = None  # rear: numbers per vector of the tokenizer's codebook; default 8
    mlp_layers: int | None = None  # rear: layers of the networks for these vectors: 2 (GELU; default) or 3 (SiLU)
    keep_replaced: bool | None = None  # rear: the encode loss includes inputs that noise changed; default false
    patches: list[int] = field(default_factory=list)  # npp: patch side of each stage, down to 1; default [2, 1]
    stage_ends: list[int] = field(default_factory=list)  # npp: updates at which the stages after the first begin

    def given(self) -> dict[str, Any]:
        """Return the settings that are not left out."""
        settings = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "kind"}
        return {name: value for name, value in settings.items() if value is not None and value != []}


def build_objective(config: ObjectiveConfig, model: ModelConfig, law: RegisterLaw,
                    register_weight: float) -> Objective:
    """Build the objective, its weights drawn from torch's current generator.

    Args:
        config: the section ``objective``.
        model: the model's sizes.
        law: the registers, of kind ``"none"`` where there are none.
        register_weight: their share of the loss.

    Raises:
        UserError: an unknown kind, a setting that its kind does not have, that it needs and is not given, or that is
            out of range, or registers beside an objective that has none.
    """
    check_choice("objective.kind", config.kind, ("mutor", *KINDS))
    kind, given = KINDS.get(config.kind), config.given()
    known = dict(list(inspect.signature(kind).parameters.items())[1:]) if kind else {}  # without the model's sizes
    for name in given:
        if name not in known:
            where = f"it has {', '.join(known)}" if known else "its settings are under registers"
            raise UserError(f"objective.{name} is no setting of objective.kind={config.kind}; {where}")
    if kind is None:
        return Mutor(model, law, register_weight) if law.registers else Objective(model)
    if law.registers:
        raise UserError(f"objective.kind={config.kind} has no registers; give registers.kind=none")
    for name, setting in known.items():
        if setting.default is setting.empty and name not in given:
            raise UserError(f"objective.{name} is not given; objective.kind={config.kind} needs it, see "
                            "docs/objectives.md")
    if "late_weight" in given and "late_from" not in given:
        raise UserError(f"objective.late_weight is {config.late_weight}, but no update is given from which it holds; "
                        "give objective.late_from, or objective.late_weight=null")
    return kind(model, **given)
