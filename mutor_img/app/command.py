"""``python -m mutor_img.app``: open one checkpoint or two, or a folder of runs, and serve the page."""

from __future__ import annotations

import argparse
import errno
import os
import socket
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from mutor_img.app.limits import Readers
from mutor_img.app.session import Side, check_comparable
from mutor_img.checkpoints.folder import newest_of
from mutor_img.common.cli import Parser
from mutor_img.common.errors import UserError, check_range
from mutor_img.sampling.options import add_sampling_flags, check_sampling_flags, open_source
from mutor_img.training.runtime import Runtime

GRADIO = (6, 31)  # as in pyproject.toml
HOST = "127.0.0.1"  # not the network: the page has no password


def _parser() -> Parser:
    parser = Parser(
        description="Serve a page to look at samples and training runs in a browser, only for this machine. The "
                    "sampling flags set the first values of the page's controls. Tokenizer, weights, dtype and "
                    "guidance schedule cannot be changed on the page.",
        example="python -m mutor_img.app --checkpoint runs/mnist/mutor2d --compare runs/mnist/ntp\n"
                "python -m mutor_img.app --runs runs",
    )
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", help="run folder, checkpoint folder, hf://org/name or LlamaGen .pt, to sample "
                                             "from")
    add("--compare", metavar="PATH", help="a second checkpoint with the same classes, shown beside the first")
    add("--runs", metavar="FOLDER", help="folder whose runs and studies can be browsed, at any depth")
    add("--port", type=int, default=7860, help="port of the page's address")
    add("--share", action="store_true", help="open a public address, too: whoever has it can use the page, and what "
                                             "it shows passes through Gradio's servers; fetches Gradio's tunnel "
                                             "program")
    add_sampling_flags(parser)
    parser.set_defaults(labels="balanced")  # so that few images show many classes
    return parser


def main(argv: Sequence[str]) -> None:
    """The command; see ``--help``. Serves until it is interrupted.

    Raises:
        UserError: a mistake in the flags or in the files they name, Gradio is missing, or the port is taken.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    check_sampling_flags(args)
    _check(parser, args)
    page = _import_page()
    # The listener before the models: they take a while. Gradio's own folder of uploads is one for all of the machine.
    with listen(args.port) as listener, tempfile.TemporaryDirectory(prefix="mutor_img_page_") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        sides = open_sides(args) if args.checkpoint else []
        readers = Readers()
        drawn = page.build_page(sides, args.runs and Path(args.runs), readers)
        page.serve(drawn, listener, Path(uploads), readers, args.share)


def _check(parser: Parser, args: argparse.Namespace) -> None:
    """Raise :class:`UserError` for flags that say nothing to show, or would change nothing."""
    if not args.checkpoint and not args.runs:
        raise UserError("--checkpoint is missing, or --runs to browse training runs (see --help)")
    if args.runs and not Path(args.runs).is_dir():
        raise UserError(f"--runs {args.runs}: no such folder; give one that contains run folders, such as runs")
    if not args.checkpoint:
        taken = [name for name in vars(args) if name not in ("runs", "port", "share")]
        parser.refuse(args, taken, "has no use without --checkpoint")


def open_sides(args: argparse.Namespace) -> list[Side]:
    """Load the checkpoints that the flags name, one or two.

    Raises:
        UserError: as :func:`~mutor_img.sampling.options.open_source`, or two that cannot stand side by side.
    """
    runtime = Runtime.start()
    sides = []
    for path in filter(None, (args.checkpoint, args.compare)):
        checkpoint = newest_of(path, args.fallback)
        source = open_source(argparse.Namespace(**{**vars(args), "checkpoint": checkpoint}), runtime)
        sides.append(Side(path, checkpoint, args.tokenizer, source))
    check_comparable(sides)
    return sides


def listen(port: int) -> socket.socket:
    """Return a socket that listens at ``port`` of this machine alone.

    Raises:
        UserError: the port is out of range, taken, or not for this user.
    """
    check_range("--port", port, 1, 65535)
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        why = "is taken by another program" if error.errno == errno.EADDRINUSE else f"({error.strerror})"
        raise UserError(f"--port {port}: {why}; give another one") from None


def _import_page() -> ModuleType:
    """Import the only module that needs Gradio, with its telemetry off from the first line on."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        found = version("gradio")
        if tuple(map(int, found.split(".")[:2])) < GRADIO:
            raise UserError(f"the page needs Gradio {'.'.join(map(str, GRADIO))} or newer, and {found} is installed; "
                            "pip install 'mutor_img[app]'")
        from mutor_img.app import page
    except ImportError as error:  # PackageNotFoundError is one
        raise UserError(f"the page needs Gradio ({error}); pip install 'mutor_img[app]'") from None
    return page
