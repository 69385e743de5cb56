"""Processes and devices: what Accelerate knows of the launch, and the few collectives that the project uses."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from mutor_img.errors import UserError
from mutor_img.training.hardware import keep_freed_memory

TIMEOUT = timedelta(minutes=30)  # a rank that is silent for longer is taken for dead


@dataclass(frozen=True)
class Runtime:
    """This process among all: CUDA when there is one, else CPU; torchrun, accelerate launch or plain python."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @classmethod
    def start(cls) -> Runtime:
        """Join the process group that the launcher describes (NCCL on GPUs, gloo on CPUs), if there is one."""
        if not torch.cuda.is_available():
            keep_freed_memory()
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
        return cls(state.device, state.process_index, state.num_processes)

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
