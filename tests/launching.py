"""Several gloo processes on this machine, as a launcher would start them, and the small runs that they do."""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
import torch

from mutor_img import transformer
from mutor_img.common.config import load_config
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training import parallel
from mutor_img.training.loop import train
from mutor_img.training.runtime import Runtime
from mutor_img.training.trainer import Trainer


def join(rank: int, world: int, port: int) -> None:
    """Stand for what a launcher sets."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)


def launch(context: BaseContext, world: int, target: Callable, root: Path) -> list[int]:
    """Run ``target(rank, world, port, root)`` in new processes; returns their statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=target, args=(rank, world, port, root)) for rank in range(world)]
    for process in processes:
        process.start()
    begun = time.monotonic()
    for process in processes:
        process.join(timeout=500 - (time.monotonic() - begun))
        process.kill()
    return [process.exitcode for process in processes]


@contextmanager
def small_preset() -> Iterator[None]:
    """Let the preset mnist be two blocks of 16, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(transformer.PRESETS, "mnist", (2, 2, 16))
        yield


def train_small(root: Path, name: str, overrides: tuple[str, ...]) -> Trainer:
    """Train the run of ``root/run.yaml``, its model small, in the folder ``root/name``."""
    with small_preset():
        config = load_config(GeneratorConfig, root / "run.yaml", [f"run_dir={root / name}", *overrides])
        runtime = Runtime.start(5)
        return train(GeneratorTask(config, runtime), config, runtime)


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
