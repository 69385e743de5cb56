"""Two tiny runs of one tokenizer, and the page's command line parsed and opened."""

import socket
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


@pytest.fixture(scope="session")
def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def served(monkeypatch, free_port) -> Callable[..., SimpleNamespace]:
    """Run the command with a stand-in for Gradio's module; returns what would be served: sides, runs, and where."""
    def start(*argv: str) -> SimpleNamespace:
        seen = SimpleNamespace()
        page = SimpleNamespace(build_page=lambda sides, runs, readers: seen.__dict__.update(sides=sides, runs=runs),
                               serve=lambda page, listener, uploads, readers, share: seen.__dict__.update(
                                   where=listener.getsockname(), share=share, uploads=uploads,
                                   private=uploads.stat().st_mode & 0o077 == 0))
        monkeypatch.setattr(command, "_import_page", lambda: page)
        monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # what the command sets goes again
        command.main([*argv] if "--port" in argv else [*argv, "--port", str(free_port)])
        return seen

    return start
