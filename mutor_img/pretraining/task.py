"""The generator as a training task: codes in, the loss of the run's objective out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mutor_img.blocks import ModelConfig
from mutor_img.checkpoints.folder import load_strict, newest_checkpoint
from mutor_img.checkpoints.loading import Loaded, load_run
from mutor_img.chunked_loss import read_out_losses
from mutor_img.common.dropout import dropout, mask_keys
from mutor_img.common.errors import UserError
from mutor_img.common.files import from_above
from mutor_img.common.streams import Stream, generator_seed, uniform
from mutor_img.data.order import TrainingCodes, check_same_codes
from mutor_img.data.store import Codes
from mutor_img.objectives.objective import Batch
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.held_out import next_token_loss
from mutor_img.pretraining.plan import training_flops, trunk_flops
from mutor_img.pretraining.preflight import Preflight, preflight
from mutor_img.pretraining.scores import RunScores
from mutor_img.sampling.pictures import PUT_BACK, draw_training_grid, verified_tokenizer
from mutor_img.training.compiling import compile_whole
from mutor_img.training.hardware import to_device
from mutor_img.training.optimizer import freeze
from mutor_img.training.runtime import Runtime
from mutor_img.training.task import Task
from mutor_img.transformer import Transformer

DOUBTED = 200  # the update after which the loss is compared with ``expected_loss``
REGISTERS = "register_embedding.weight"
CLASS_TABLE = "cls_embedding.embedding_table.weight"


class GeneratorTask(Task):
    """Train a :class:`~mutor_img.transformer.Transformer` on a code store, for the objective of its config."""

    unit = "tokens"
    shardable = True

    def __init__(self, config: GeneratorConfig, runtime: Runtime):
        """Open the codes and build the model.

        Raises:
            UserError: missing or damaged codes, or codes that do not fit the config.
        """
        self.config, self.runtime = config, runtime
        runtime.agree(asdict(config))
        self.preflight: Preflight | None = None
        self.law = config.law()
        self._counted: tuple[int, dict[str, int]] = -1, {}  # a step, and its losses' terms
        self.data = TrainingCodes([open_codes(f, config, runtime) for f in config.data.folders()], config.seed)
        self.codes = self.data.stores[0]
        self.val_codes = open_codes(config.data.val_codes, config, runtime) if config.data.val_codes else None
        if self.val_codes:
            check_same_codes(self.codes, self.val_codes)
        codebook = open_codebook(config, self._about_codes())
        torch.manual_seed(generator_seed(config.seed, Stream.INIT))  # the model's weights, then the objective's
        self.model = Transformer(config.model_config())
        if config.init_from and runtime.from_main(lambda: newest_checkpoint(config.run_dir) is None):
            taken = start_from(self.model, config.init_from, self._about_codes() if runtime.is_main else None)
            runtime.agree({f"the content of init_from={config.init_from}": taken})
        self.model.objective = objective = config.build_objective()
        freeze(self.model, config.freeze)
        if codebook is not None:
            objective.take_codebook(codebook)
        # Not on CPUs in fp32, where a run's bits hang on one compiler less.
        if config.train.compile and (config.train.precision == "bf16" or runtime.device.type == "cuda"):
            self.model.drop_inputs = compile_whole(dropout)
            if not config.model.loss_chunk:
                objective.read_out = compile_whole(read_out_losses)
        steps = config.train.steps
        self.headline = tuple(dict.fromkeys(  # losses of the first update, and of the last
            ("loss", *objective.weights(0, steps), *objective.weights(steps - 1, steps), "val_next_token")))
        self.units_per_sample = self.law.length  # code tokens; registers are method, not data
        self._trunk_flops = trunk_flops(self.model, self.law, config.seed)
        self.score_every, self.scores = config.eval.every, None
        if self.score_every:
            self.scores = RunScores(config.eval, self._about_codes(), self.model, config.seed, runtime)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [*model.layers, *model.objective.blocks()]

    def flops_per_sample(self, step: int) -> float:
        return training_flops(self._trunk_flops, self.model.objective, step)

    def batch(self, step: int, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return labels (b,), the same with the null class where they are dropped, and codes (b, N), on the CPU.

        ``samples`` are global sample numbers (b,).
        """
        codes, labels = self.data.batch(samples.numpy())
        drawn = uniform(self.config.seed, Stream.CLASS_DROP, step, samples)
        return labels, torch.where(drawn < self.config.model.class_dropout, self.config.model.classes, labels), codes

    def loss(self, model: nn.Module, step: int, samples: Tensor,
             average: nn.Module | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this micro-batch's share of the objective's loss, and of its parts before they are weighted."""
        labels, dropped, codes = self.batch(step, samples)  # (b,), (b,), (b, N)
        config, device, objective = self.config, self.runtime.device, self.model.objective
        batch = on_device(objective.prepare(config.seed, step, samples, dropped, codes), device)
        if objective.teacher_taps:
            clean = to_device(labels, device), to_device(codes[:, :-1], device)
            with torch.no_grad():
                batch.teacher = average(within=lambda whole: whole.run(*clean, taps=objective.teacher_taps).states)
        if batch.anchors is not None and self.model.flex is None and self.flex_passes(device):
            self.model.use_flex(batch.anchors, fixed=self.law.count is None)
        keys = None
        if config.model.dropout or config.model.drop_path:
            keys = to_device(mask_keys(config.seed, step, samples, self.model.places), device)
        sums = model(within=lambda whole: whole.objective(whole, batch, config.model.loss_chunk), keys=keys)
        terms, weights = self._terms(step), objective.weights(step, config.train.steps)
        means = {name: sums[name] / terms[name] for name in weights}
        return sum(weights[name] * mean for name, mean in means.items()), means

    def wants_flex(self, device: torch.device) -> bool:
        """Return whether registers attend by FlexAttention there; it has no backward on CPUs."""
        compiled = self.config.train.compile  # uncompiled FlexAttention would build the whole matrix of scores
        return self.config.model.attention == "auto" and compiled and device.type == "cuda"

    def flex_passes(self, device: torch.device) -> bool:
        """Return whether to use FlexAttention; the first call, before any update, compares it on every process."""
        if self.preflight is None and self.wants_flex(device):
            self.preflight = preflight(self.law, self.model.config, self.config.train.precision, self.config.seed,
                                       self.runtime)
            self.preflight.record(self.config.run_dir, self.runtime)
        return self.preflight is not None and self.preflight.passed

    def _terms(self, step: int) -> dict[str, int]:
        """Return how many terms each loss has in the whole global batch: a mean over ranks would depend on them."""
        batch = self.config.train.global_batch
        if self._counted[0] != step:  # once per update, not once per micro-batch
            everyone = torch.arange(step * batch, (step + 1) * batch)
            self._counted = step, self.model.objective.terms(self.config.seed, step, everyone)
        return self._counted[1]

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Return the next-token loss on the held-out codes, first view, in nats per token."""
        if self.val_codes is None:
            return {}
        size, chunk = min(250, self.config.train.global_batch), self.config.model.loss_chunk
        loss = next_token_loss(model, self.model.config, self.val_codes, size, self.runtime, chunk)
        return {"val_next_token": loss}

    def doubt(self, step: int, values: Mapping[str, float]) -> str | None:
        """Return what to tell where the loss after update ``DOUBTED`` is not in ``expected_loss``.

        A run that has hardly learnt by then, because its learning rate still rises, is not doubted.
        """
        loss, config = values.get("next_token"), self.config
        if (step != DOUBTED or not config.expected_loss or config.init_from or loss is None
                or config.optim.warmup_steps > DOUBTED):
            return None
        low, high = config.expected_loss
        if low <= loss <= high:
            return None
        hint = ("it learns little: look at optim.lr, gradient_norm and data.codes" if loss > high else
                "something may tell it the answers, or the codes are too plain: look at them with tokenizer.inspect")
        return (f"next_token is {loss:.3f} after {step} updates, and expected_loss is {low:g} to {high:g}; "
                f"{hint} (docs/imagenet.md, 'What loss should I see?')")

    def score(self, model: nn.Module, step: int) -> dict[str, float]:
        try:
            return self.scores(model)
        except UserError as error:  # weights of this moment that cannot be sampled from: training goes on
            tqdm.write(f"no scores at step {step}: {error}")
            return {}

    def draw_pictures(self, model: nn.Module, folder: Path, step: int) -> None:
        try:
            draw_training_grid(model, self._about_codes(), self.config.pictures, self.config.seed,
                               folder / f"samples_{step:08d}.png")
        except UserError as error:  # a missing tokenizer is no reason to end a training run
            tqdm.write(f"no sample grid at step {step}: {error}")

    def metadata(self) -> dict[str, Any]:
        checked = {"preflight": self.preflight.to_json()} if self.preflight else {}
        return {"kind": "generator", "model": self.model.config.to_json(), **checked, "codes": self._about_codes()}

    def _about_codes(self) -> dict[str, Any]:
        info, stores = self.codes.info, self.data.stores
        tokenizer = from_above(info.tokenizer, self.codes.folder)
        return {"class_names": info.class_names, "image_size": info.image_size, "tokenizer": tokenizer,
                "tokenizer_hash": info.tokenizer_hash, "stores": [
                    {"path": str(store.folder), "hash": store.content_hash(), "crop": store.info.crop,
                     "views": store.info.views} for store in stores]}


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch that was made on the CPU, on the device; the CPU does not wait."""
    moved = {name: to_device(value, device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **moved)


def start_from(model: Transformer, path: str, codes: dict[str, Any] | None = None) -> str:
    """Take a checkpoint's weights; returns their hash.

    A register embedding that it lacks stays as drawn, one that the model has no use for is left out. The table of
    classes stays as drawn where it has another number of them. Where its classes have other names, or its codes were
    made by another tokenizer, a line says so: another data set may be meant.

    Args:
        model: takes the weights; every other name and shape must fit.
        path: run folder, checkpoint folder (averaged weights where it has any), or LlamaGen ``.pt``.
        codes: what the run knows of its codes, where this process speaks; None: nothing is said.

    Raises:
        UserError: nothing readable is there, or a weight does not fit.
    """
    loaded = load_run(path, grid=model.config.grid)
    found, wanted, weights = loaded.model.config, model.config, loaded.model.state_dict()
    if found.qk_norm != wanted.qk_norm:
        raise UserError(f"init_from={path}: was trained with{'' if found.qk_norm else 'out'} QK-norm, but "
                        f"model.qk_norm is {str(wanted.qk_norm).lower()}; give "
                        f"model.qk_norm={str(found.qk_norm).lower()}")
    if found.classes != wanted.classes:
        weights[CLASS_TABLE] = model.get_parameter(CLASS_TABLE).detach()
    for note in _differences(path, loaded, wanted, codes) if codes else ():
        print(f"note: {note}", file=sys.stderr)
    if model.config.register_offsets is None:
        weights.pop(REGISTERS, None)
    else:
        weights.setdefault(REGISTERS, model.register_embedding.weight.detach())
    load_strict(model, weights, path)
    return loaded.weights_hash


def _differences(path: str, loaded: Loaded, wanted: ModelConfig, codes: dict[str, Any]) -> Iterator[str]:
    """Yield what a person should know of weights that begin on other codes than those that they come from."""
    theirs, ours = loaded.codes.get("tokenizer_hash"), codes["tokenizer_hash"]
    classes = loaded.model.config.classes
    if theirs not in (None, ours):
        yield (f"init_from={path} knows codes of a tokenizer with sha256 {theirs[:16]}, and those of data.codes are of "
               f"one with {ours[:16]}: the same code may mean something else")
    if classes != wanted.classes:
        yield (f"init_from={path} has {classes} classes, and data.codes {wanted.classes}: all class embeddings "
               "start at random")
        return
    for label, (name, own) in enumerate(zip(loaded.codes.get("class_names") or (), codes["class_names"])):
        if name != own:
            yield (f"class {label} is {name!r} in init_from={path}, and {own!r} in data.codes: it starts with "
                   "the embedding of another class")
            return


def open_codebook(config: GeneratorConfig, codes: dict[str, Any]) -> Tensor | None:
    """Return the vectors of the codes, (V, c) fp32, as the tokenizer's decoder sees them; None: nobody reads them.

    Args:
        config: the run's.
        codes: what the run knows of its codes; names the tokenizer and its hash.

    Raises:
        UserError: the tokenizer is gone or another one, or its vectors have another length than the config says.
    """
    with torch.device("meta"):
        wanted = config.build_objective().code_dim
    if wanted is None:
        return None
    vq = verified_tokenizer(codes, "cpu", config.model_config(), "the run", PUT_BACK)
    vectors = vq.quantize.codes()  # (V, c)
    if vectors.shape[1] != wanted:
        raise UserError(f"objective.code_dim is {wanted}, but the codes of {vq.path} are vectors of {vectors.shape[1]} "
                        f"numbers; give objective.code_dim={vectors.shape[1]}")
    return vectors


def open_codes(folder: str, config: GeneratorConfig, runtime: Runtime) -> Codes:
    """Open a code store, check that it fits the model of ``config``, and verify it, each process its share of blocks.

    Raises:
        UserError: naming the key of the config that differs from the store, or the block that is damaged; or other
            processes see other codes there.
    """
    codes = Codes(folder)
    found = {"grid": tuple(codes.info.grid), "vocabulary": codes.info.vocabulary,
             "classes": len(codes.info.class_names)}
    for name, value in found.items():
        wanted = getattr(config.model, name)
        wanted = tuple(wanted) if name == "grid" else wanted
        if wanted != value:
            raise UserError(f"{folder}: the codes have {name} {value}, the config says model.{name}={wanted}")
    if len(codes) == 0:
        raise UserError(f"{folder}: holds no images")
    runtime.agree({f"the content of {folder}": codes.content_hash()})
    faults = codes.faults(range(runtime.rank, codes.blocks, runtime.world))
    codes.refuse(runtime.sum(torch.from_numpy(faults).to(runtime.device)).cpu().numpy())
    return codes
