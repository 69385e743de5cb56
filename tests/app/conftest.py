"""Two tiny runs of one tokenizer, and the page's command line parsed and opened."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from tiny_runs import write_generator, write_tokenizer

from mutor_img.app import command


@pytest.fixture(scope="session")
def two_runs(random_model, tmp_path_factory) -> tuple[str, str]:
    """Run folders of two generators of the same three classes."""
    root = tmp_path_factory.mktemp("app")
    vq = write_tokenizer(root / "tokenizer")
    return tuple(write_generator(root / name, random_model((4, 4), seed=seed), vq)
                 for seed, name in enumerate(("first", "second")))


@pytest.fixture
def served(monkeypatch) -> Callable[..., SimpleNamespace]:
    """Run the command with a stand-in for Gradio's module; returns what would be served: sides, host and port."""
    def start(*argv: str) -> SimpleNamespace:
        seen = SimpleNamespace()
        page = SimpleNamespace(build_page=lambda sides: seen.__dict__.update(sides=sides),
                               serve=lambda page, host, port: seen.__dict__.update(host=host, port=port))
        monkeypatch.setattr(command, "_import_page", lambda: page)
        command.main(list(argv))
        return seen

    return start
