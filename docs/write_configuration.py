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
from mutor_img.study.config import StudyConfig
from tokenizer.training.config import TokenizerConfig

PAGE = Path(__file__).with_name("configuration.md")
SCHEMAS = (
    ("The generator: `train.py`", GeneratorConfig), ("The tokenizer: `python -m tokenizer.train`", TokenizerConfig),
    ("The demo: `python -m mutor_img.study`", StudyConfig),
)
HEAD = """# Configuration

A config is a YAML file of the keys below; what it leaves out has its default. `extends: other.yaml` takes over another
file, and `key=value` after `--config FILE` overrides both, as in `optim.lr=1e-4 registers.count=null`. An unknown key
or a value of another type is an error that names the nearest key; a key that stands twice in a file is an error, too.
`run_dir` is the config's own path with `configs/` read as `runs/` unless it is given. `--dry-run` prints the whole
config and what it costs.

The shipped configs also go by their names, from any folder and after any kind of install: `--config
imagenet256/mutor2d_b_80`, `extends: imagenet256/ntp_b`. A `configs/` in the current folder comes first. The run folder
is then `runs/imagenet256/mutor2d_b_80` in the current folder.

What is given to a text field stays as it was typed: `run_dir=0010` is the folder `0010`, and `run_dir=2024-01-01` no
date. `~` at the beginning is the home folder, in files, in overrides and in every flag. A list is set as a whole:
`optim.betas=[0.9,0.95]`.

A variation of a run is a file of a few lines, or the same file with overrides and a `run_dir` of its own:

    python train.py --config configs/mnist/mutor2d.yaml registers.d_max=3 run_dir=runs/mnist/mutor2d_d3

A run that is there goes on with the same seed, model, objective, registers, data and global batch only; another
learning rate, precision or EMA is said at the start, and the earlier config stays beside the new one.
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
