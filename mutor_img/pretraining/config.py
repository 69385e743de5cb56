"""The config of a generator's training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from mutor_img.blocks import ModelConfig
from mutor_img.common.config import OptimConfig, TrainConfig
from mutor_img.common.errors import UserError, check_choice, check_range
from mutor_img.data.store import MOST_CODES
from mutor_img.metrics.networks import check_features
from mutor_img.metrics.requirements import check_names
from mutor_img.objectives.config import ObjectiveConfig, build_objective
from mutor_img.objectives.objective import Objective
from mutor_img.registers import RegisterLaw
from mutor_img.training.optimizer import freeze
from mutor_img.transformer import Transformer


@dataclass
class CodesConfig:
    """Where the codes are."""

    codes: Any = "codes/imagenet256"  # a code store made by tokenizer.encode, or several, as a list or as a,b
    val_codes: str | None = None  # held-out codes for the validation loss; null: no validation

    def folders(self) -> list[str]:
        """Return the code stores' folders; raises :class:`UserError` where ``codes`` names none."""
        found = self.codes.split(",") if isinstance(self.codes, str) else self.codes
        if not isinstance(found, list) or not found or not all(isinstance(f, str) and f.strip() for f in found):
            raise UserError(f"data.codes is {self.codes!r}; give the folder of a code store, or several as a,b")
        return [folder.strip() for folder in found]


@dataclass
class ModelSection:
    """The transformer."""

    preset: str = "B"  # tiny, mnist, B, L, XL, XXL, 3B
    grid: tuple[int, int] = (16, 16)  # rows and columns of codes; must match the code store
    vocabulary: int = 16384  # number of codes; must match the code store
    classes: int = 1000  # number of classes; must match the code store
    dropout: float = 0.1  # dropout rate of the embedded sequence, the attention output and the feed-forward
    drop_path: float = 0.0  # drop-path rate; above 0 it switches the latter two dropouts off
    class_dropout: float = 0.1  # share of samples trained with the null class
    qk_norm: bool = False  # normalise queries and keys: steadier, but may cost FID; not for released weights
    attention: str = "auto"  # for registers in training: auto (FlexAttention on CUDA if compiled, else SDPA) or sdpa
    loss_chunk: int = 0  # rows of logits that the training loss holds at a time; saves memory; 0: all rows

    def validate(self) -> None:
        """Raise :class:`UserError` for a value out of range."""
        check_choice("model.attention", self.attention, ("auto", "sdpa"))
        check_range("model.loss_chunk", self.loss_chunk, 0, 10**9)
        check_range("model.class_dropout", self.class_dropout, 0.0, 1.0)
        check_range("model.vocabulary", self.vocabulary, 1, MOST_CODES)
        check_range("model.classes", self.classes, 1, 10**6)


@dataclass
class RegistersConfig:
    """MuToR (method sections 2 to 5)."""

    kind: str = "2d"  # none, 1d, 2d, set
    count: int | None = None  # registers per sequence at random anchors; null: one after each input (dense)
    d_max: int = 4  # largest offset, per axis in 2D
    offsets: list[int] = field(default_factory=list)  # for kind set: the raster offsets to draw from, as in [3, 5, 7]
    loss_weight: float = 0.5  # weight of the registers' loss; the next-token loss has 1 minus this
    every: int | None = None  # one register after every this many inputs; null: off
    mixed_offsets: bool = False  # one offset per register instead of one per sequence
    embedding: str = "shared"  # shared: one vector for all registers; per_offset: one vector per offset
    wrap: bool = True  # a 2D offset past the right edge continues in the next row; false: it has no target

    def validate(self) -> None:
        """Raise :class:`UserError` for a value out of range."""
        check_range("registers.loss_weight", self.loss_weight, 0.0, 1.0)
        check_choice("registers.embedding", self.embedding, ("shared", "per_offset"))


@dataclass
class PicturesConfig:
    """The sample grids drawn while training."""

    cfg_scale: float = 2.0  # guidance scale
    per_class: int = 8  # images per class, for the first ten classes

    def validate(self) -> None:
        """Raise :class:`UserError` for a value out of range."""
        check_range("pictures.cfg_scale", self.cfg_scale, 1.0, 100.0)
        check_range("pictures.per_class", self.per_class, 1, 64)


@dataclass
class PlanConfig:
    """The devices that ``--dry-run`` plans for. Training itself takes those it finds."""

    devices: int = 1  # number of devices
    device_gib: float = 80.0  # memory of one device, GiB
    usable: float = 0.9  # share of that memory for tensors; CUDA, NCCL and fragmentation take the rest
    peak_tflops: float | None = None  # dense peak of one device; null: H100 SXM (989 in bf16, 67 in fp32)
    memory_tbs: float | None = None  # TB/s of one device's memory; null: H100 SXM (3.35)
    mfu: float | None = None  # share of that peak that the model's FLOPs reach; null: what the cost model computes

    def validate(self) -> None:
        """Raise :class:`UserError` for a value out of range."""
        check_range("plan.devices", self.devices, 1, 10**6)
        check_range("plan.device_gib", self.device_gib, 0.0, 1e5, low_open=True)
        check_range("plan.usable", self.usable, 0.0, 1.0, low_open=True)
        if self.peak_tflops is not None:
            check_range("plan.peak_tflops", self.peak_tflops, 0.0, 1e6, low_open=True)
        if self.memory_tbs is not None:
            check_range("plan.memory_tbs", self.memory_tbs, 0.0, 1e4, low_open=True)
        if self.mfu is not None:
            check_range("plan.mfu", self.mfu, 0.0, 1.0, low_open=True)


@dataclass
class EvalConfig:
    """The scores computed while training. A few samples show a trend; they do not give a figure to report."""

    every: int = 0  # steps between scores; the end of the run is scored too; 0: never
    samples: int = 2000  # samples per score; their Frechet distance is higher than that of 50000 samples
    reference: str = ""  # what evaluate_fid.py --reference takes
    metrics: list[str] = field(default_factory=list)  # some of fid, sfid, is, pr, kid; empty: all possible ones
    features: str = "inception"  # feature network: inception, mnist, classifier, or timm:NAME
    features_weights: str | None = None  # classifier folder, timm weights, or Inception's if not in the default place
    cfg_scale: float = 2.0  # guidance scale

    def validate(self) -> None:
        """Raise :class:`UserError` for a value out of range, unknown metrics or features, or a missing reference."""
        check_range("eval.every", self.every, 0, 10**9)
        check_range("eval.samples", self.samples, 2, 10**7)
        check_range("eval.cfg_scale", self.cfg_scale, 1.0, 100.0)
        if self.metrics:
            check_names(self.metrics)
        check_features(self.features, self.features_weights)
        if self.every and not self.reference:
            raise UserError("eval.reference is empty; eval.every needs a reference to score against")


@dataclass
class GeneratorConfig:
    """A generator's training run."""

    run_dir: str = ""  # folder of the run; empty: the config's path, with runs/ instead of configs/
    seed: int = 0  # seed of the weights, data order, views, registers, class dropout and dropout
    init_from: str | None = None  # weights to start from: a run, a checkpoint, hf://org/name, or a LlamaGen .pt
    freeze: list[str] = field(default_factory=list)  # names of weights that are not trained; * matches anything
    expected_loss: list[float] = field(default_factory=list)  # [low, high]: warn if next_token is outside at step 200
    data: CodesConfig = field(default_factory=CodesConfig)
    model: ModelSection = field(default_factory=ModelSection)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    registers: RegistersConfig = field(default_factory=RegistersConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def validate(self) -> None:
        """Raise :class:`UserError` for sections that do not fit each other; each section has checked itself before."""
        self.data.folders()
        if self.expected_loss and (len(self.expected_loss) != 2 or not self.expected_loss[0] < self.expected_loss[1]):
            raise UserError(f"expected_loss is {list(self.expected_loss)}; give the lowest and the highest next-token "
                            "loss, as in [7.0,9.6], or [] for no warning")
        with torch.device("meta"):
            objective = self.build_objective()  # raises for registers, a preset or settings that cannot be
            if self.freeze:
                model = Transformer(self.model_config())
                model.objective = objective
                freeze(model, self.freeze)  # raises for a pattern that cannot be meant
        if objective.teacher_taps and not self.train.ema:
            raise UserError(f"objective.kind={self.objective.kind} learns from averaged weights, but train.ema is 0.0; "
                            "give a decay, as in train.ema=0.9999")

    def inputs(self) -> dict[str, Any]:
        """Return every path that a run reads, by its key."""
        return {"init_from": self.init_from, "data.codes": self.data.folders(), "data.val_codes": self.data.val_codes,
                "eval.reference": self.eval.reference or None, "eval.features_weights": self.eval.features_weights}

    def law(self) -> RegisterLaw:
        """Return the registers' law; raises :class:`UserError` where it cannot be drawn."""
        r = self.registers
        return RegisterLaw(r.kind, tuple(self.model.grid), r.d_max, r.count, r.every, r.mixed_offsets, r.wrap,
                           tuple(r.offsets))

    def build_objective(self) -> Objective:
        """Build what the run trains for; raises :class:`UserError` where that cannot be."""
        return build_objective(self.objective, self.model_config(), self.law(), self.registers.loss_weight)

    def model_config(self) -> ModelConfig:
        """Return the model's shapes."""
        m, offsets = self.model, None
        if self.registers.kind != "none":
            offsets = self.law().offsets if self.registers.embedding == "per_offset" else ()
        return ModelConfig.preset(m.preset, grid=tuple(m.grid), vocabulary=m.vocabulary, classes=m.classes,
                                  dropout=m.dropout, drop_path=m.drop_path, register_offsets=offsets,
                                  qk_norm=m.qk_norm)
