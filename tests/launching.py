"""Several gloo processes on this machine, as a launcher would start them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path

import torch


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
