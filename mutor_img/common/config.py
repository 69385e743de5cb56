"""Typed configuration: a YAML file, what it extends, dotted overrides, and errors that suggest.

OmegaConf does the merging and the type checks. A file may begin with ``extends: other.yaml`` (relative to
itself), so that shared values stand once. The sections here are shared by every training command.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mutor_img.common.errors import UserError, check_range, suggest

C = TypeVar("C")


@dataclass
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 4e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's, of the first and the second moment
    weight_decay: float = 0.05  # on tensors of two or more dimensions
    clip: float = 1.0  # global gradient norm; 0 switches clipping off
    schedule: str = "constant"  # constant, cosine, or wsd (warm-up, stable, decay)
    warmup_steps: int = 0  # linear from 0 to lr
    decay_steps: int = 0  # wsd only: the last steps, linear down to final_lr
    final_lr: float = 0.0  # where cosine and wsd end

    def validate(self) -> None:
        """Raise :class:`UserError` for a value out of range."""
        check_range("optim.lr", self.lr, 0.0, 10.0, low_open=True)
        check_range("optim.weight_decay", self.weight_decay, 0.0, 1e3)
        check_range("optim.clip", self.clip, 0.0, 1e9)
        check_range("optim.final_lr", self.final_lr, 0.0, self.lr)
        check_range("optim.warmup_steps", self.warmup_steps, 0, 10**9)
        check_range("optim.decay_steps", self.decay_steps, 0, 10**9)
        for beta in self.betas:
            check_range("optim.betas", beta, 0.0, 1.0)
        check_choice("optim.schedule", self.schedule, ("constant", "cosine", "wsd"))


@dataclass
class TrainConfig:
    """How long, how large, how precise, and what is written when."""

    steps: int = 360_000  # optimiser updates
    global_batch: int = 1024  # sequences or images an update, over all processes
    micro_batch: int = 0  # of a process and a forward pass, at most; 0: the whole share of the process
    precision: str = "bf16"  # bf16: autocast over fp32 weights; fp32; auto: bf16 where the device computes in it
    compile: bool = True  # torch.compile, block by block
    activation_checkpointing: bool = False  # compute each block's activations again in the backward pass: less memory
    parallel: str = "ddp"  # several processes: ddp: each holds all; fsdp: weights, gradients, optimiser and EMA sharded
    timeout_minutes: float = 30.0  # silence after which another process is taken for dead
    ema: float = 0.0  # decay of the averaged weights, warmed up; 0: none
    log_every: int = 50  # steps between log lines
    checkpoint_every: int = 5000  # steps between checkpoints; 0: at the end only
    keep: int = 2  # newest checkpoints kept
    validate_every: int = 5000  # steps between validations; 0: never
    picture_every: int = 5000  # steps between pictures; 0: never

    def validate(self) -> None:
        """Raise :class:`UserError` for a value out of range."""
        for name in ("steps", "global_batch", "log_every", "keep"):
            check_range(f"train.{name}", getattr(self, name), 1, 10**9)
        for name in ("micro_batch", "checkpoint_every", "validate_every", "picture_every"):
            check_range(f"train.{name}", getattr(self, name), 0, 10**9)
        check_range("train.ema", self.ema, 0.0, 0.999999)
        check_range("train.timeout_minutes", self.timeout_minutes, 0.0, 1e5, low_open=True)
        check_choice("train.precision", self.precision, ("bf16", "fp32", "auto"))
        check_choice("train.parallel", self.parallel, ("ddp", "fsdp"))


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise :class:`UserError` naming the nearest known value unless ``value`` is one of them."""
    if value not in known:
        raise UserError(f"{name} is {value!r}{suggest(value, known)}")


def load_config(schema: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read ``path`` and what it extends, apply ``key.sub=value`` overrides, and check every value.

    Args:
        schema: a dataclass of dataclasses with a ``run_dir`` field and, where it wants checks, ``validate()``.
            An empty ``run_dir`` becomes the config's own path with ``configs/`` read as ``runs/``.

    Raises:
        UserError: a missing file, broken YAML, an unknown key (the nearest is named), a value of another
            type, or whatever ``validate`` refuses.
    """
    config = OmegaConf.structured(schema)
    for layer, origin in _layers(Path(path)):
        config = _merge(config, layer, schema, origin)
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or key.startswith("-"):
            raise UserError(f"override {text!r} is not of the form key=value, as in optim.lr=1e-4")
        try:
            layer = OmegaConf.from_dotlist([text])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(f"override {text!r}: {_first_line(error)}") from None
        config = _merge(config, layer, schema, f"override {text!r}")
    if not config.run_dir:
        config.run_dir = default_run_dir(path)
    try:
        value = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_first_line(error)}") from None
    validate(value)
    return value


def default_run_dir(path: str | Path) -> str:
    """Return the config's path without its ending, with its last ``configs`` folder read as ``runs``."""
    parts = list(Path(path).with_suffix("").parts)
    if "configs" in parts:
        parts[len(parts) - 1 - parts[::-1].index("configs")] = "runs"
        return str(Path(*parts))
    return str(Path("runs") / parts[-1])


def validate(config: Any) -> None:
    """Call ``validate()`` on the config and on each section that has one."""
    for item in dataclasses.fields(config):
        section = getattr(config, item.name)
        if dataclasses.is_dataclass(section):
            validate(section)
    if hasattr(config, "validate"):
        config.validate()


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain dicts, lists and scalars, ready for JSON or YAML."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def to_yaml(config: Any) -> str:
    """Return the resolved config as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def field_names(schema: type, prefix: str = "") -> list[str]:
    """Return the dotted names of every leaf field of a config schema."""
    hints = typing.get_type_hints(schema)
    names = []
    for item in dataclasses.fields(schema):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            names += field_names(kind, f"{prefix}{item.name}.")
        else:
            names.append(prefix + item.name)
    return names


def _layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Any, str]]:
    """Return the chain of YAML files from the root of ``extends`` to ``path``, each with its name."""
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself")
    if not path.is_file():
        what = "a folder, not a config file" if path.is_dir() else "no such config file"
        raise UserError(f"{path}: {what}; give --config the path of a YAML file")
    try:
        layer = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({_first_line(error)})") from None
    if not isinstance(layer, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, not a {type(layer).__name__}")
    parent = layer.pop("extends", None)
    below = _layers(path.parent / parent, (*seen, path.resolve())) if parent else []
    return [*below, (OmegaConf.create(layer), str(path))]


def _merge(config: Any, layer: Any, schema: type, origin: str) -> Any:
    try:
        return OmegaConf.merge(config, layer)
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = str(error.full_key or error.key)
        raise UserError(f"{origin}: unknown key {key!r}{suggest(key, field_names(schema))}") from None
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{origin}: {where}{_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


