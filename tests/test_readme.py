"""Every command that the README and the pages in docs/ show is one that the program takes."""

import importlib.util
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from mutor_img.common.cli import Parser
from mutor_img.common.config import load_config
from mutor_img.study.comparison.command import is_comparison
from mutor_img.study.comparison.config import ComparisonConfig

ROOT = Path(__file__).parent.parent
DOORS = {"train.py": "mutor_img.pretraining.command", "sample.py": "mutor_img.sampling",
         "evaluate_fid.py": "mutor_img.evaluation.command"}


class Parsed(Exception):
    """Raised in place of running a command whose arguments were understood."""


def shown() -> list[str]:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = [line.strip() for path in documents for line in path.read_text().replace("\\\n", " ").splitlines()
             if re.match(r"( {4,}|\t)(python|torchrun|accelerate launch|make) ", line)]
    return sorted(set(lines))


def module_and_arguments(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command, comments=True)
    begin = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    words = words[begin:]  # after python, or torchrun and its options
    if words[0] == "-m":
        return words[1], words[2:]
    return DOORS.get(words[0], words[0]), words[1:]


def schema_of(module: str, config: str) -> type:
    """Return the config schema of a training command."""
    if module == "mutor_img.study.__main__" and is_comparison(config):
        return ComparisonConfig
    name, schema = {"mutor_img.pretraining.command": ("mutor_img.pretraining.config", "GeneratorConfig"),
                    "tokenizer.train": ("tokenizer.training.config", "TokenizerConfig"),
                    "mutor_img.study.__main__": ("mutor_img.study.config", "StudyConfig")}[module]
    return getattr(import_module(name), schema)


def test_the_page_of_all_config_keys_is_the_code_s():
    spec = importlib.util.spec_from_file_location("write_configuration", ROOT / "docs" / "write_configuration.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(), "run python docs/write_configuration.py"


def test_the_readme_shows_its_commands():
    assert sum(line.startswith("make") for line in shown()) >= 2 and len(shown()) > 10


@pytest.mark.parametrize("command", [c for c in shown() if not c.startswith("make")])
def test_a_shown_command_is_understood(command, monkeypatch):
    module, arguments = module_and_arguments(command)
    for name in ("parse_args", "parse_intermixed_args"):
        real = getattr(Parser, name)

        def parse(self, *args, real=real):
            raise Parsed(real(self, *args))

        monkeypatch.setattr(Parser, name, parse)
    if module.endswith(".py"):
        assert (ROOT / module).is_file()
        return
    if (ROOT / module.replace(".", "/") / "__main__.py").is_file():
        module += ".__main__"
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed) as caught:
        import_module(module).main(arguments)
    options = caught.value.args[0]
    if getattr(options, "config", None):
        schema = schema_of(module, options.config)
        load_config(schema, options.config, options.overrides)  # every key and value is one it takes


@pytest.mark.parametrize("target", [c.split()[1] for c in shown() if c.startswith("make")])
def test_a_shown_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def links() -> list[tuple[str, str]]:
    """Return (page, link) of every link to a file."""
    pages = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
    return [(str(page.relative_to(ROOT)), link) for page in pages
            for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text())]


@pytest.mark.parametrize("page, link", links())
def test_a_link_leads_somewhere(page, link):
    assert ((ROOT / page).parent / link).exists()
