"""The command line of every training command: ``--config FILE``, dotted overrides, ``--dry-run``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mutor_img.checkpoints.folder import leave_damaged
from mutor_img.common.cli import Parser
from mutor_img.common.config import config_files, load_config, record, to_yaml
from mutor_img.common.errors import UserError
from mutor_img.common.locks import folder_lock
from mutor_img.common.outputs import RUN_SIGNS, keep_apart, refuse_strange_folder
from mutor_img.training.hardware import computes_in_bf16, precision_on
from mutor_img.training.loop import train
from mutor_img.training.runtime import Runtime
from mutor_img.training.stopping import Stopped, StopRequest, end_now
from mutor_img.training.task import Task
from mutor_img.training.trainer import Trainer


def train_command(argv: Sequence[str], task: type[Task], schema: type, plan: Callable[[Any], dict[str, Any]], *,
                  description: str, example: str) -> None:
    """Be a training command: parse, and print the plan or train.

    Args:
        argv: the arguments.
        task: what is trained.
        schema: the config's dataclass.
        plan: returns from a config what the dry run prints beside it.
        description, example: for ``--help``.
    """
    parser = training_parser(description=description, example=example)
    parser.add_argument("--fallback", action="store_true", help="if the newest checkpoint is damaged, go on from the "
                        "newest intact one; the damaged one gets another name")
    arguments = parser.parse_intermixed_args(argv)
    config = read_training(arguments, schema, plan)
    if config is not None:
        run_task(task, config, arguments.fallback)


def training_parser(*, description: str, example: str, override: str = "optim.lr=1e-4") -> Parser:
    """Return the parser of a training command line, for commands that have further flags.

    Args:
        description, example: the parser's.
        override: an example of one.
    """
    parser = Parser(description=description, example=example)
    parser.add_argument("--config", required=True, metavar="FILE",
                        help="YAML config, or the name of a shipped one: its path below configs/, without .yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and a plan, then stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[],
                        help=f"values that replace those of the config, such as {override}")
    return parser


def read_training(arguments: argparse.Namespace, schema: type, plan: Callable[[Any], dict[str, Any]]) -> Any | None:
    """Return the config of parsed arguments, or None after ``--dry-run`` has printed it and its plan."""
    config = load_config(schema, arguments.config, arguments.overrides)
    run_dir = Path(config.run_dir)
    keep_apart({"run_dir": [run_dir, run_dir / "config.yaml"]},
               {"--config": written_by_hand(schema, arguments.config), **config.inputs()},
               removed={"run_dir": run_dir / "checkpoints"})
    if hasattr(config, "train"):
        refuse_strange_folder("run_dir", run_dir, RUN_SIGNS, "run")
        here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config.train.precision = precision_on(here, config.train.precision)  # before a plan or a record
    if not arguments.dry_run:
        return config
    print(to_yaml(config))
    for name, value in plan(config).items():
        if isinstance(value, dict):  # a section
            print(f"\n{name}")
            print("\n".join(f"  {row:<50} {_readable(cell):>24}" for row, cell in value.items()))
        else:
            print(f"{name:<68} {_readable(value)}")
    return None


def written_by_hand(schema: type, config: str) -> list[Path]:
    """Return those files of a config that a run did not write itself: its own record it may write again."""
    return [path for path, _ in config_files(config) if not _is_record(schema, path)]


def _is_record(schema: type, path: Path) -> bool:
    try:
        found = load_config(schema, path)
    except UserError:  # a file that is whole only with what extends it, or with the command line
        return False
    return path.read_text() in (record(found), to_yaml(found))


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 1e6 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def run_task(task: type[Task], config: Any, fallback: bool = False) -> Trainer:
    """Join the processes of the launch and train ``task(config, runtime)``.

    With ``fallback`` the damaged newest checkpoints of the run are left behind first.

    SIGTERM or SIGINT before there is anything to save ends the process here, with status 0 where it is alone.

    Raises:
        UserError: another process trains in the same ``run_dir``, or what ``task`` and :func:`train` raise.
    """
    runtime = None
    with StopRequest() as stop:
        try:
            with stop.at_once():
                runtime = Runtime.start(config.train.timeout_minutes)
            if runtime.is_main and config.train.precision == "bf16" and not computes_in_bf16(runtime.device):
                print("note: this processor has no bf16 instructions, and training in bf16 is many times slower than "
                      "in fp32 on it; train.precision=auto takes what is fast", file=sys.stderr)
            with runtime.one_voice(), ExitStack() as owned:
                with stop.at_once():
                    owned.enter_context(runtime.claim(folder_lock(config.run_dir, keeps=True)))
                    if fallback:
                        runtime.from_main(lambda: str(leave_damaged(config.run_dir)))
                    job = task(config, runtime)
                trainer = train(job, config, runtime, stop)
                runtime.leave()
                return trainer
        except Stopped:
            if runtime is None or (runtime.is_main and not runtime.failed()):
                print("stopped before the first update was done; to resume, run the same command again")
            # Peers may be in a collective for this process: a launcher ends them where a process has failed.
            end_now(0 if os.environ.get("WORLD_SIZE", "1") == "1" else 128 + signal.SIGTERM)
