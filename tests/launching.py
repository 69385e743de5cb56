"""Several gloo processes on this machine, as a launcher would start them, and the small runs that they do."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.chaos.steps import Step
from mutor_img import blocks
from mutor_img.common.config import load_config
from mutor_img.objectives import mirai, rear
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training import parallel, updates
from mutor_img.training.loop import train
from mutor_img.training.runtime import Runtime
from mutor_img.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
updates.peak_flops = functools.cache(updates.peak_flops)  # measured in each process, not in each run: half of a run
SAVING = """import os, pathlib, signal, sys, time
folder = pathlib.Path({folder!r})
def save(*_):
    (folder / "saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(folder / "begun").write_text(str(os.getpid()))
time.sleep(300)
"""  # the code of a child that saves when it is told to end


def join(rank: int, world: int, port: int) -> None:
    """Stand for what a launcher sets."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)


def launch(context: BaseContext, world: int, target: Callable, given: object) -> list[int]:
    """Run ``target(rank, world, port, given)`` in new processes; returns their statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=target, args=(rank, world, port, given)) for rank in range(world)]
    for process in processes:
        process.start()
    begun = time.monotonic()
    for process in processes:
        process.join(timeout=500 - (time.monotonic() - begun))
        process.kill()
    return [process.exitcode for process in processes]


def launch_command(context: BaseContext, world: int, main: Callable, words: Sequence[object]) -> None:
    """Run a command in several processes, as torchrun would; each must end well."""
    assert launch(context, world, functools.partial(_command, main), [str(word) for word in words]) == [0] * world


def _command(main: Callable, rank: int, world: int, port: int, words: list[str]) -> None:
    join(rank, world, port)
    main(words)


@contextmanager
def small_presets() -> Iterator[None]:
    """Let presets be a block of 16, mnist two of them, and objectives' own layers as small, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in blocks.PRESETS:
            patch.setitem(blocks.PRESETS, name, (2 if name == "mnist" else 1, 2, 16))
        for module in (mirai, rear):
            patch.setattr(module, "WIDTH", 32)
        yield


def train_small(root: Path, name: str, overrides: tuple[str, ...]) -> Trainer:
    """Train the run of ``root/run.yaml``, its model small, in the folder ``root/name``."""
    with small_presets():
        config = load_config(GeneratorConfig, root / "run.yaml", [f"run_dir={root / name}", *overrides])
        runtime = Runtime.start(5)
        return train(GeneratorTask(config, runtime), config, runtime)


def digest(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of weights in a checkpoint."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


@contextmanager
def counted_graphs() -> Iterator[list]:
    """Compile blocks by a backend that only collects their graphs, in the list that this gives."""
    graphs = []

    def collect(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "compile_blocks", functools.partial(parallel.compile_blocks, backend=collect))
        torch._dynamo.reset()
        yield graphs


def start_sampling(*flags: object, processes: int = 1, cwd: Path) -> subprocess.Popen:
    """Start ``sample.py`` in another process, or under torchrun in several."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    program = [sys.executable, *(launch if processes > 1 else ()), str(ROOT / "sample.py"), *map(str, flags)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def start_fork(folder: Path, *words: str) -> Step:
    """Start one of the project's commands in a folder, as a fork; the commands that it starts are forks, too.

    What it prints goes to ``folder/printed.txt``. Saves the import of torch, which takes longer than a small run.
    """
    class Fork(Step):
        log = folder / "printed.txt"

        @staticmethod
        def begin() -> None:
            os.chdir(folder)
            subprocess.Popen = Fork

    return Fork([sys.executable, *words])


def end_with_its_child(processes: BaseContext, target: Callable[[Path], None], folder: Path, number: int
                       ) -> BaseProcess:
    """Send a signal to a process once its child, which is ``SAVING``, has begun; both must end. Returns the process."""
    parent = processes.Process(target=target, args=(folder,))
    parent.start()
    while not (folder / "begun").is_file() or not (folder / "begun").read_text():
        assert parent.is_alive() and time.sleep(0.1) is None
    child = psutil.Process(int((folder / "begun").read_text()))
    os.kill(parent.pid, number)
    parent.join(60)
    _, alive = psutil.wait_procs([child], timeout=60)
    assert not alive or child.status() == psutil.STATUS_ZOMBIE
    return parent
