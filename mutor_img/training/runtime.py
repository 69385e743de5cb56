"""Processes and devices: what Accelerate knows of the launch, and the few collectives that the project uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from mutor_img.common.errors import UserError
from mutor_img.training.hardware import keep_freed_memory

_FAILURES = "mutor_img/failures"  # a counter in the store


@dataclass(frozen=True)
class Runtime:
    """This process among all: CUDA when there is one, else CPU; torchrun, accelerate launch or plain python."""

    device: torch.device
    rank: int = 0
    world: int = 1
    timeout: timedelta = timedelta(minutes=30)  # a process that is silent for longer is taken for dead

    @classmethod
    def start(cls, timeout_minutes: float = 30.0) -> Runtime:
        """Join the process group that the launcher describes (NCCL on GPUs, gloo on CPUs), if there is one."""
        if not torch.cuda.is_available():
            keep_freed_memory()
        timeout = timedelta(minutes=timeout_minutes)
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timeout)
        return cls(state.device, state.process_index, state.num_processes, timeout)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def autocast(self, precision: str) -> AbstractContextManager:
        """Return bf16 autocast over fp32 weights, or for ``"fp32"`` a context that does nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let rank 0 go through this block before the others, e.g. where it may have to download a file."""
        if not self.is_main:
            self.barrier()
        try:
            yield
        finally:
            if self.is_main:
                self.barrier()

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """In here one process's failure ends all, and only the process that met it first says so.

        The others find their peer gone in the middle of a collective, which is no news.
        """
        try:
            yield
        except Exception as error:
            if self.world == 1:
                raise
            error.speaks = _store().add(_FAILURES, 1) == 1
            if error.speaks or isinstance(error, (UserError, OSError)):
                raise
            raise SystemExit(1) from None

    def failed(self) -> bool:
        """Return whether a process has failed within :meth:`one_voice`."""
        return self.world > 1 and _store().check([_FAILURES])

    def leave(self) -> None:
        """Leave the process group, at the end of a command."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def share(self, total: int, name: str) -> int:
        """Return this process's part of ``total``.

        Raises:
            UserError: ``total`` is not divisible by the number of processes.
        """
        if total % self.world:
            lower = total // self.world * self.world
            raise UserError(f"{name} is {total}, not divisible by {self.world} processes; "
                            f"use {lower or self.world} or {lower + self.world}")
        return total // self.world


def _store() -> dist.Store:
    """Return the key-value store at which the processes met; it works where collectives no longer do."""
    return dist.distributed_c10d._get_default_store()
