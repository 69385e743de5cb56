"""Numbers that are none: NaN and infinity in a weight, a gradient, a batch, an average, a moment, a discriminator.

Nothing of it may reach a checkpoint. What the update's loss or gradients show is refused before any weight moves; what
they don't show is refused before the checkpoint is written. The message names the step. Where one update may be
skipped, the first bad one moves nothing, and the second is refused.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.chaos import inputs
from benchmarks.chaos.case import Case, Fault, Place, said_no
from mutor_img import blocks
from mutor_img.checkpoints.folder import newest_intact
from mutor_img.common.config import load_config
from mutor_img.common.errors import UserError
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training.runtime import Runtime
from mutor_img.training.trainer import Trainer
from tokenizer.encode import encode_images
from tokenizer.images.layouts import open_images
from tokenizer.train import TokenizerTask
from tokenizer.training.config import TokenizerConfig

VALUES = {"NaN": math.nan, "infinity": math.inf, "-infinity": -math.inf}
GENERATOR = """
data: {{codes: {folder}/codes}}
model: {{preset: mnist, grid: [4, 4], vocabulary: 16, classes: 3, dropout: 0.0}}
registers: {{kind: 2d, count: 6, d_max: 3}}
train: {{steps: 9, global_batch: 4, precision: fp32, compile: false, ema: 0.9, validate_every: 0, picture_every: 0}}
"""
TOKENIZER = """
data: {{images: {folder}/images, val_images: {folder}/images, image_size: 16, crop_min: 1.0, workers: 1}}
model: {{preset: mnist, channels: 8, vocabulary: 32, code_dim: 4}}
loss: {{adversarial_weight: 0.5, adversarial_start: 0, discriminator_channels: 4, discriminator_layers: 1}}
train: {{steps: 9, global_batch: 4, precision: fp32, compile: false, ema: 0.9, validate_every: 0, picture_every: 0}}
"""
# target: whose training it is in
TARGETS = {"a weight": GENERATOR, "a weight that no update uses": GENERATOR, "a gradient": GENERATOR,
           "the average": GENERATOR, "a moment": GENERATOR, "a weight of the tokenizer": TOKENIZER,
           "a batch": TOKENIZER, "the tokenizer's average": TOKENIZER, "the discriminator": TOKENIZER}
SKIPPED = ("a gradient", "a batch", "the discriminator")  # a number in a weight of the model stays, and nothing helps


def attempt(target: str, value: str, folder: str, run: str, skips: int) -> str:
    """Train two updates and save, put the number in, and go on as the loop does; runs in a fork.

    Returns what was refused: ``"before the update"`` or ``"before the checkpoint"``, and the message.
    """
    torch.set_num_threads(1)
    trainer = open_trainer(TARGETS[target], Path(folder), Path(folder) / run, skips)
    for _ in range(2):
        trainer.update()
    trainer.save()
    _put(target, VALUES[value], trainer)
    before = _state(trainer)
    for _ in range(skips):
        trainer.update()
        if not _same(before, _state(trainer)):
            return "weights moved"
    try:
        trainer.update()
    except UserError as error:
        return f"before the update|{error}" if _same(before, _state(trainer)) else "weights moved"
    try:
        trainer.save()
    except UserError as error:
        return f"before the checkpoint|{error}"
    return "nothing was refused"


def open_trainer(text: str, folder: Path, run: Path, skips: int = 0) -> Trainer:
    """Return a trainer of ``GENERATOR`` or a variant of ``TOKENIZER``, at the beginning or at its checkpoint."""
    blocks.PRESETS["mnist"] = (1, 2, 16)
    path = folder / f"{run.name}.yaml"
    path.write_text(text.format(folder=folder) + f"run_dir: {run}\n")
    schema, task = (GeneratorConfig, GeneratorTask) if text is GENERATOR else (TokenizerConfig, TokenizerTask)
    config = load_config(schema, path, [f"train.skip_bad_updates={skips}"])
    runtime = Runtime(torch.device("cpu"))
    return Trainer(task(config, runtime), config, runtime)


@torch.no_grad()
def _put(target: str, value: float, trainer: Trainer) -> None:
    """Put a number where the target is."""
    model = trainer.model
    weight = max(model.parameters(), key=Tensor.numel)
    if target == "a weight that no update uses":
        weight = model.cls_embedding.embedding_table.weight
        weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), 0.0))
        trainer.task.data.stores[0].labels = trainer.task.data.stores[0].labels * 0 + 1
        weight[0, 0] = value
    elif target.startswith("a weight"):
        weight.view(-1)[0] = value
    elif target == "a gradient":
        weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), value))
    elif "average" in target:
        max(trainer.ema.module.parameters(), key=Tensor.numel).view(-1)[0] = value
    elif target == "a moment":
        trainer.optimizer.state[weight]["exp_avg"].view(-1)[0] = value
    elif target == "a batch":
        trainer.wrapped.register_forward_pre_hook(lambda _, given: (given[0].index_fill(0, torch.tensor([0]), value),
                                                                    *given[1:]))
    else:
        next(iter(trainer.task.adversary.discriminator.parameters())).view(-1)[0] = value


def _state(trainer: Trainer) -> list[Tensor]:
    """Return copies of all that an update moves, bit for bit.

    The average of a weight that is NaN or infinite is left out: it becomes NaN, and neither is ever saved.
    """
    weights = trainer.model.state_dict()
    averages = [average.where(weights[name].isfinite(), 0.0)
                for name, average in trainer.ema.module.state_dict().items()]
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    beside = [tensor for group in trainer.task.tensors().values() for tensor in group.values()]
    held = [*weights.values(), *averages, *moments, *beside]
    return [tensor.clone().view(torch.uint8) if tensor.dim() else tensor.clone().view(1).view(torch.uint8)
            for tensor in held]


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def cases(place: Place) -> list[Case]:
    """Return a case for each target and number; where it passes with its update, one more, which may skip one."""
    inputs.write_images(place.folder / "images", side=16)
    small = inputs.write_images(place.folder / "small")
    encode_images(inputs.write_tokenizer(place.folder / "tokenizer"), open_images(small), place.folder / "codes",
                  runtime=Runtime(torch.device("cpu")))
    tried = [(target, value, 0) for target, value in product(TARGETS, VALUES)]
    tried += [(target, value, 1) for target, value in product(SKIPPED, VALUES)]
    return [Case(f"{value} in {target}" + ", one update may be skipped" * skips,
                 lambda n=number, t=target, v=value, s=skips: _try(t, v, s, f"run_{n}", place))
            for number, (target, value, skips) in enumerate(tried)]


def _try(target: str, value: str, skips: int, run: str, place: Place) -> str:
    answer = place.forks.run(f"{__name__}:attempt", target, value, str(place.folder), run, skips)
    if answer["outcome"] != "returned" or "|" not in answer["message"]:
        raise Fault(f"{answer['outcome']}: {answer['message'][:500]}")
    outcome, _, message = answer["message"].strip('"').partition("|")
    message = said_no({"outcome": "refused", "message": message}, place.folder / run)
    if f"step {2 + skips}" not in message and "step 3" not in message:
        raise Fault(f"the step is not named: {message}")
    if newest_intact(place.folder / run).name != "step_00000002":
        raise Fault("the last good checkpoint is gone")
    return outcome
