"""Write docs/configuration.md: every key of every training config, its default, and the comment beside it in the code.

    python docs/write_configuration.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from pathlib import Path

import yaml

from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.study.comparison.config import ComparisonConfig, RowConfig
from mutor_img.study.config import StudyConfig
from tokenizer.training.config import TokenizerConfig

PAGE = Path(__file__).with_name("configuration.md")
SCHEMAS = (
    ("The generator: `train.py`", GeneratorConfig), ("The tokenizer: `python -m tokenizer.train`", TokenizerConfig),
    ("The demo: `python -m mutor_img.study`", StudyConfig),
    ("A comparison: `python -m mutor_img.study` with rows ([study.md](study.md))", ComparisonConfig),
    ("A row of a comparison: an item of `rows`", RowConfig),
)
HEAD = """# Configuration

A config is a YAML file with the keys below. If a key is left out, it has its default. `extends: other.yaml` takes the
keys of another file first. `key=value` after `--config FILE` overrides both: `optim.lr=1e-4 registers.count=null`.
An unknown key is an error that names the nearest key. A value of the wrong type is an error, and so is a key that
occurs twice in a file. A file may contain `format: mutor_img config 1`; runs write it into theirs
([formats.md](formats.md)). If `run_dir` is not given, it is the path of the config with `runs/` instead of `configs/`.
`--dry-run` prints the whole config and what the run costs.

You can give the shipped configs by name, from any folder and after any kind of installation:
`--config imagenet256/mutor2d_b_80`, `extends: imagenet256/ntp_b`. The run folder is then
`runs/imagenet256/mutor2d_b_80` in the current folder. If the current folder has a `configs/`, that one is searched
first.

The value of a text field stays as you typed it: `run_dir=0010` is the folder `0010`, and `run_dir=2024-01-01` is not a
date. `~` at the beginning means the home folder, in files, in overrides and in every flag. A list is set as a whole:
`optim.betas=[0.9,0.95]`.

For a variation of a run, write a file of a few lines, or use the same file with overrides and another `run_dir`:

    python train.py --config configs/mnist/mutor2d.yaml registers.d_max=3 run_dir=runs/mnist/mutor2d_d3

An existing run can only continue with the same seed, model, objective, registers, data and global batch. If the
learning rate, the precision or the decay of EMA changes, the run prints the change at the start, and keeps the
earlier config beside the new one. EMA cannot be switched on later.
"""


def comments(schema: type) -> dict[str, str]:
    """Return the comment beside each field of a dataclass."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(schema), re.MULTILINE))


def rows(schema: type, prefix: str = "") -> list[str]:
    """Return a table row for each leaf field, sections one after the other."""
    hints, words, lines = typing.get_type_hints(schema), comments(schema), []
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[item.name]):
            lines += rows(hints[item.name], f"{prefix}{item.name}.")
            continue
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        shown = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True)
        lines.append(f"| `{prefix}{item.name}` | `{shown.splitlines()[0]}` | {words.get(item.name, '')} |")
    return lines


def page() -> str:
    """Return the page's text."""
    parts = [HEAD]
    for title, schema in SCHEMAS:
        parts.append("\n".join([f"\n## {title}\n", "| key | default | |", "|---|---|---|", *rows(schema)]) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
