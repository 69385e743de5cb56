"""Typed configuration: a YAML file, what it extends, dotted overrides, and errors that suggest.

OmegaConf does the merging and the type checks. A file may begin with ``extends: other.yaml`` (relative to
itself, or a shipped config's name), so that shared values stand once, and ``format: mutor_img config 1`` says which
version of this format it is in. Words become numbers by the type of their field
and not by how they look: what is given to a text field stays as it was typed. The sections here are shared by every
training command.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import BooleanNode, FloatNode, IntegerNode, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from mutor_img.common.errors import UserError, check_choice, check_range, first_line, suggest
from mutor_img.common.files import check_format
from mutor_img.common.plain_yaml import Null, is_null, parse
from mutor_img.common.shipped import PACKAGED, find_config

C = TypeVar("C")
FORMAT = "mutor_img config 1"  # what a file may say of itself under the key format
_ELSEWHERE = {  # where a key, or all of a section, belongs that this program's config has not
    "data": "train.py or python -m tokenizer.train", "data.codes": "train.py", "data.val_codes": "train.py",
    "registers": "train.py", "objective": "train.py", "data.images": "python -m tokenizer.train",
    "revival": "python -m tokenizer.train", "loss": "python -m tokenizer.train",
    "cfg_scales": "python -m mutor_img.study", "base": "python -m mutor_img.study"}
_FORMS = {dict: "a mapping of keys to values", list: "a list", str: "one value"}
_NUMBERS = {int: (IntegerNode, "a whole number, as in 1000"), float: (FloatNode, "a number, as in 1e-4"),
            bool: (BooleanNode, "true or false")}


@dataclass
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 4e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's betas, for the first and the second moment
    weight_decay: float = 0.05  # for tensors of two or more dimensions
    clip: float = 1.0  # largest global gradient norm; 0: no clipping
    schedule: str = "constant"  # constant, cosine, or wsd (warm-up, stable, decay)
    warmup_steps: int = 0  # steps in which the rate rises linearly from 0 to lr
    decay_steps: int = 0  # wsd only: last steps, in which the rate falls linearly to final_lr
    decay_share: float = 0.0  # wsd only: in place of decay_steps, a share of all steps, or of those between restarts
    restarts: list[int] = field(default_factory=list)  # updates at which the whole schedule starts anew
    final_lr: float = 0.0  # learning rate at which cosine and wsd end; a smaller lr stays as it is

    def validate(self) -> None:
        """Raise :class:`UserError` for a value out of range."""
        check_choice("optim.schedule", self.schedule, ("constant", "cosine", "wsd"))
        check_range("optim.lr", self.lr, 0.0, 10.0, low_open=True)
        check_range("optim.weight_decay", self.weight_decay, 0.0, 1e3)
        check_range("optim.clip", self.clip, 0.0, 1e9)
        check_range("optim.final_lr", self.final_lr, 0.0, 10.0)
        check_range("optim.warmup_steps", self.warmup_steps, 0, 10**9)
        check_range("optim.decay_steps", self.decay_steps, 0, 10**9)
        check_range("optim.decay_share", self.decay_share, 0.0, 1.0)
        if self.decay_steps and self.decay_share:
            raise UserError(f"optim.decay_steps is {self.decay_steps} and optim.decay_share is {self.decay_share}; set "
                            "one of them to 0")
        if self.schedule != "wsd" and (self.decay_steps or self.decay_share):
            name = "decay_steps" if self.decay_steps else "decay_share"
            raise UserError(f"optim.{name} is {getattr(self, name)}, but optim.schedule is {self.schedule}, which has "
                            f"no decay of that length; give optim.schedule=wsd, or optim.{name}=0")
        if any(a >= b for a, b in pairwise([0, *self.restarts])):
            raise UserError(f"optim.restarts is {list(self.restarts)}; give rising updates from 1 on")
        for beta in self.betas:
            check_range("optim.betas", beta, 0.0, 0.999999)  # AdamW divides by 1 - beta


@dataclass
class TrainConfig:
    """How long, how large, how precise, and what is written when."""

    steps: int = 360_000  # optimiser updates
    global_batch: int = 1024  # sequences or images per update, over all processes
    micro_batch: int = 0  # sequences or images per process and forward pass, at most; 0: the whole share
    precision: str = "bf16"  # bf16 (autocast over fp32 weights), fp32, or auto (bf16 if the device computes in it)
    compile: bool = True  # use torch.compile, block by block
    activation_checkpointing: bool = False  # saves memory: the backward pass computes activations again
    parallel: str = "ddp"  # ddp: each process holds all; fsdp: weights, gradients, optimiser and EMA are sharded
    timeout_minutes: float = 30.0  # a process that is silent for this long counts as dead
    ema: float = 0.0  # decay of the averaged weights, with warm-up; 0: no averaging
    skip_bad_updates: int = 0  # how many updates of 1000 may be skipped for NaN or infinity; 0: the first ends the run
    check_ranks_every: int = 1000  # steps between comparisons of the processes' copies of the weights; 0: never
    log_every: int = 50  # steps between log lines
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])  # beside metrics.jsonl: tensorboard, wandb
    checkpoint_every: int = 5000  # steps between checkpoints; 0: only at the end
    keep: int = 2  # number of newest checkpoints to keep
    milestones: list[int] = field(default_factory=list)  # updates after which a checkpoint is written too, and kept
    validate_every: int = 5000  # steps between validations; 0: never
    picture_every: int = 5000  # steps between pictures; 0: never

    def validate(self) -> None:
        """Raise :class:`UserError` for a value out of range."""
        for name in ("steps", "global_batch", "log_every", "keep"):
            check_range(f"train.{name}", getattr(self, name), 1, 10**9)
        for name in ("micro_batch", "check_ranks_every", "checkpoint_every", "validate_every", "picture_every"):
            check_range(f"train.{name}", getattr(self, name), 0, 10**9)
        check_range("train.skip_bad_updates", self.skip_bad_updates, 0, 999)
        for step in self.milestones:
            check_range("train.milestones", step, 1, 10**9)
        check_range("train.ema", self.ema, 0.0, 0.999999)
        check_range("train.timeout_minutes", self.timeout_minutes, 0.0, 1e5, low_open=True)
        for name in self.trackers:
            check_choice("train.trackers", name, ("tensorboard", "wandb"))
        check_choice("train.precision", self.precision, ("bf16", "fp32", "auto"))
        check_choice("train.parallel", self.parallel, ("ddp", "fsdp"))

    def shares(self, parts: int, of: str) -> tuple[int, int]:
        """Return the samples of an update on one of ``parts`` processes, and those of one forward pass.

        Args:
            parts: how many share the global batch.
            of: what they are, for the error.

        Raises:
            UserError: the global batch does not divide by them, or a process's share by the micro batch.
        """
        if self.global_batch % parts:
            lower = self.global_batch // parts * parts
            raise UserError(f"train.global_batch is {self.global_batch}, not divisible by {of}; use "
                            f"{lower or parts} or {lower + parts}")
        share = self.global_batch // parts
        micro_batch = min(self.micro_batch or share, share)
        if share % micro_batch:
            raise UserError(f"train.micro_batch is {micro_batch}, but each of {of} has {share} of the global batch; "
                            f"give a divisor of {share}")
        return share, micro_batch


def load_config(schema: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read ``path`` and what it extends, apply ``key.sub=value`` overrides, and check every value.

    Text that begins with ``~`` has the home folder in its place.

    Args:
        schema: a dataclass of dataclasses with a ``run_dir`` field and, where it wants checks, ``validate()``.
            An empty ``run_dir`` becomes :func:`default_run_dir`.
        path: a file, or the name of a shipped config (:func:`~mutor_img.common.shipped.find_config`).
        overrides: for a text field everything after the ``=``, without quotes around it.

    Raises:
        UserError: a missing file, broken YAML, a key that stands twice, an unknown key (the nearest is named), a value
            of another type, or whatever ``validate`` refuses.
    """
    config = OmegaConf.structured(schema)
    files = config_files(path)
    for file, layer in files:
        config = _merge(config, layer, schema, str(file))
    for text in overrides:
        config = _merge(config, _override(text, schema), schema, f"override {text!r}")
    try:
        value = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {first_line(error)}") from None
    value.run_dir = value.run_dir or default_run_dir(files[-1][0])
    validate(value)
    return value


def config_files(path: str | Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """Return the files of a config, from the root of ``extends`` to ``path`` itself, and what each says.

    Raises:
        UserError: one is missing, is no YAML mapping, of a later format, or extends itself.
    """
    path = find_config(os.path.expanduser(path))
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself; give extends another file, or remove it")
    try:
        layer = parse(path.read_text(), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML ({first_line(error)})") from None
    layer = {} if layer is None else layer
    if not isinstance(layer, dict):
        kind = "a list" if isinstance(layer, list) else "one value"
        raise UserError(f"{path}: a config is a mapping of keys to values, not {kind}")
    check_format(layer.pop("format", FORMAT), FORMAT, path)
    parent = layer.pop("extends", "")
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends is {parent!r}; give the path of one YAML file")
    if not parent:
        return [(path, layer)]
    beside = path.parent / os.path.expanduser(parent)
    try:
        below = config_files(beside if beside.is_file() else parent, (*seen, path.resolve()))
    except UserError as error:
        raise error if beside.is_file() else UserError(f"{path}: extends {parent}: {error}") from None
    return [*below, (path, layer)]


def default_run_dir(path: str | Path) -> str:
    """Return the config's path without its ending, with its last ``configs`` folder read as ``runs``.

    A shipped config that lies in the installed package has its run folder below the current one.
    """
    if Path(path).is_relative_to(PACKAGED):
        path = Path("configs") / Path(path).relative_to(PACKAGED)
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


def to_yaml(config: Any) -> str:
    """Return the resolved config as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def record(config: Any) -> str:
    """Return what a run writes down of its config: the resolved config as YAML text, and its format."""
    return f"format: {FORMAT}\n{to_yaml(config)}"


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


def _override(text: str, schema: type) -> dict[str, Any]:
    """Return a ``key.sub=value`` as the mapping that a file would hold."""
    key, equals, raw = text.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"override {text!r} is not of the form key=value, as in optim.lr=1e-4")
    parts = re.sub(r"\[([^\[\]]*)\]", r".\1", key).split(".")
    hint = _type_of(parts, schema, text)
    raw = raw.strip()
    if not raw:  # as a variable of the shell leaves it that is not set; of a path it would make this folder
        none = f"{key}=null" if type(None) in typing.get_args(hint) else f"{key}=\"''\"" if hint is str else ""
        raise UserError(f"override {text!r}: {key} is empty; give a value, or leave the override out"
                        + f", or write {none} for none" * bool(none))
    if _is_text(hint) and raw[:1] not in ("'", '"', "[", "{"):  # as typed, with all that YAML would take for a sign
        value = Null(raw) if is_null(raw) else raw
    else:
        value = parse(raw, f"override {text!r}")
    for part in reversed(parts):
        value = {part: value}
    return value


def _type_of(parts: Sequence[str], schema: type, text: str) -> Any:
    """Return the type of the field that an override names by the parts of its key."""
    hint: Any = schema
    for place, part in enumerate(parts):
        if dataclasses.is_dataclass(hint):
            hints = typing.get_type_hints(hint)
            if part not in hints:
                raise _unknown(f"override {text!r}", ".".join(parts), schema)
            hint = hints[part]
        elif typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        else:
            name = ".".join(parts[:place])
            form = f"{name}=[…], the whole list" if typing.get_origin(hint) in (list, tuple) else f"{name}=value"
            raise UserError(f"override {text!r}: {name} is not set by its parts; give {form}")
    return hint


def _is_text(hint: Any) -> bool:
    return hint in (Any, str, str | None)


def _settle(value: Any, hint: Any, key: str = "") -> Any:
    """Return a layer with what only the schema can decide: whether a word is text or nothing, and homes of paths.

    Args:
        value: what stands at ``key``.
        hint: the type of that field; None: no field is known there.
        key: its dotted name.

    Raises:
        UserError: nothing where something must stand, or a list, a mapping or a single value in place of another.
    """
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    section = dataclasses.is_dataclass(hint)
    wanted = dict if section or kind is dict else list if kind in (list, tuple) else str
    if isinstance(value, Null):
        if hint is str and value != "~":
            return str(value)
        if section and not value:
            return {}  # a section without a line
        if hint in (Any, None) or type(None) in inner:
            return None
        raise UserError(f"{key} is {str(value) or 'empty'}; give {_FORMS[wanted]}")
    if hint not in (Any, None) and not isinstance(value, wanted):
        raise UserError(f"{key} is {value!r}; give {_FORMS[wanted]}" + f": {key}=[{value}]" * (wanted is list))
    if value == "???":  # OmegaConf's word for what is yet to come: it would pass over it
        raise UserError(f"{key} is {value}; give a value")
    if isinstance(value, str):
        _check_number(value, hint, key)
    if isinstance(value, dict):
        hints = typing.get_type_hints(hint) if section else {}
        if section and key.endswith("]"):  # OmegaConf would not say in which item
            for name in value.keys() - hints.keys():
                raise UserError(f"unknown key '{key}.{name}'{suggest(name, hints)}")
        among = inner[1] if kind is dict else None
        return {name: _settle(item, hints.get(name, among), f"{key}.{name}".lstrip(".")) for name, item in
                value.items()}
    if isinstance(value, list):
        if kind is tuple and len(value) != len(inner):
            raise UserError(f"{key} has {len(value)} values; give {len(inner)}")
        items = inner[0] if inner else None
        names = [f"{key}[{place}]" if dataclasses.is_dataclass(items) else key for place in range(len(value))]
        return [_settle(item, items, name) for item, name in zip(value, names)]
    return re.sub(r"(^|,\s*)(~[^/,]*)", lambda found: found[1] + os.path.expanduser(found[2]), value)


def _check_number(text: str, hint: Any, key: str) -> None:
    """Raise :class:`UserError` for what is to be a number or a switch, and is none. OmegaConf decides."""
    kind = next((one for one in (*typing.get_args(hint), hint) if one in _NUMBERS), None)
    if kind is None or "${" in text:  # a reference to another value
        return
    node, form = _NUMBERS[kind]
    try:
        node(text)
    except ValidationError:
        raise UserError(f"{key} is {text!r}; give {form}") from None


def _merge(config: Any, layer: Any, schema: type, origin: str) -> Any:
    try:
        return OmegaConf.merge(config, OmegaConf.create(_settle(layer, schema)))
    except (ConfigKeyError, ConfigAttributeError) as error:
        raise _unknown(origin, str(error.full_key or error.key), schema) from None
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{origin}: {where}{first_line(error)}") from None
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def _unknown(origin: str, key: str, schema: type) -> UserError:
    known = field_names(schema)
    if key in known:  # in a file, where OmegaConf takes no dots
        section, _, name = key.rpartition(".")
        return UserError(f"{origin}: {key!r} is a key for the command line; in a file write {section}: {{{name}: …}}")
    section = key.partition(".")[0]
    ours = any(name.startswith(f"{section}.") for name in known)
    if program := _ELSEWHERE.get(key) or (None if ours else _ELSEWHERE.get(section)):
        return UserError(f"{origin}: unknown key {key!r}; {program} has it: give that this config")
    return UserError(f"{origin}: unknown key {key!r}{suggest(key, known)}")
