"""The layout: which packages there are, and that imports point down."""

import contextlib
import re
from collections import Counter
from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parent.parent
METHOD = {"__init__", "attention", "blocks", "chunked_loss", "convert", "registers", "transformer"}


def classes(folder: str) -> list[str]:
    """Return the names of all classes below a folder."""
    texts = [path.read_text() for path in (ROOT / folder).rglob("*.py")]
    return [name for text in texts for name in re.findall(r"^class (\w+)", text, re.MULTILINE)]


def test_imports_point_down_the_layers(capsys):
    with contextlib.chdir(ROOT):
        assert lint_imports(config_filename="pyproject.toml", no_cache=True) == 0, capsys.readouterr().out


def test_a_reader_who_opens_mutor_img_sees_the_method_alone():
    assert {path.stem for path in (ROOT / "mutor_img").glob("*.py")} == METHOD


def test_the_engine_and_the_metrics_know_no_model():
    for package in ("training", "metrics", "common", "data"):
        for path in (ROOT / "mutor_img" / package).glob("*.py"):
            assert "mutor_img.transformer" not in path.read_text(), path


def test_no_class_stands_under_one_name_in_both_packages():
    both = Counter(set(classes("mutor_img"))) + Counter(set(classes("tokenizer")))
    assert not [name for name, count in both.items() if count > 1]
