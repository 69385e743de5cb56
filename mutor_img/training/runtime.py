"""Processes and devices: what Accelerate knows of the launch, and the few collectives that the project uses."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from mutor_img.common import processes
from mutor_img.common.child import die_with_torchrun
from mutor_img.common.errors import UserError
from mutor_img.common.locks import Lock, claim
from mutor_img.training.hardware import keep_freed_memory

DEVICES = "auto (CUDA if available), cpu, cuda or cuda:N"  # what --device takes

PATIENCE = 24 * 60.0  # minutes that the processes of a command other than training wait for each other

T = TypeVar("T")
_FAILURES = "mutor_img/failures"  # a counter in the store
_GONE = "Connection closed by peer", "Connection reset by peer", "Broken pipe"  # gloo's words


@dataclass(frozen=True)
class Runtime:
    """This process among all: CUDA when there is one, else CPU; torchrun, accelerate launch or plain python."""

    device: torch.device
    rank: int = 0
    world: int = 1
    timeout: timedelta = timedelta(minutes=30)  # a process that is silent for longer is taken for dead

    @classmethod
    def start(cls, timeout_minutes: float = 30.0) -> Runtime:
        """Join the process group that the launcher describes (NCCL on GPUs, gloo on CPUs), if there is one.

        If torchrun itself is gone, nobody ends the other processes when one fails: so each gets SIGTERM then.

        Raises:
            UserError: Slurm started several tasks and no launcher told them of each other, or torchrun more processes
                than there are GPUs.
        """
        check_launcher(os.environ)
        if not torch.cuda.is_available():
            keep_freed_memory()
        _check_devices()
        timeout = timedelta(minutes=timeout_minutes)
        die_with_torchrun()  # a process that waits in its rendezvous hears no SIGTERM, and has nothing to save
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timeout)
        die_with_torchrun(signal.SIGTERM)
        return cls(state.device, state.process_index, state.num_processes, timeout)

    @classmethod
    def on(cls, name: str) -> Runtime:
        """Join the launch, if there is one, on what ``--device`` names, for a command that makes or reads files.

        They wait up to a day for each other: one of them may write what all have made, or have a slow disk.

        Raises:
            UserError: no such device, or another one than the launch has for this process.
        """
        if name == "auto":
            return cls.start(PATIENCE)
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UserError(f"--device {name!r} is not a device; give auto, cpu, cuda or cuda:N") from None
        devices = {"cpu": 1, "cuda": torch.cuda.device_count()}
        if (device.index or 0) >= devices.get(device.type, 0):
            raise UserError(f"--device {name}: there is no such device here ({devices['cuda']} CUDA devices); give "
                            "another or leave it out")
        launched = cls.start(PATIENCE)
        if launched.world == 1:
            return cls(device)
        if device.index is not None or device.type != launched.device.type:
            raise UserError(f"--device {name}: the {launched.world} processes use {launched.device.type}, one device "
                            "each; leave it out, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on CPUs")
        return launched

    @property
    def devices(self) -> str:
        """What all processes compute on together, as "CPU" or "8 x NVIDIA H100 80GB HBM3"."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return name if self.world == 1 else f"{self.world} x {name}"

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

    def from_main(self, look: Callable[[], T]) -> T:
        """Return what ``look()`` gives on rank 0, a JSON value, once all processes have it; the others do not look.

        Whatever decides what is done next and stands on a disk comes through here: see ``common/processes.py``.

        Raises:
            UserError, OSError: rank 0 met it; then every process raises it.
        """
        found = processes.from_main(look)
        self.barrier()
        return found

    def agree(self, values: Mapping[str, Any], fix: str = processes.SAME) -> None:
        """Check that all processes were given the same JSON values, by name; all call this.

        Raises:
            UserError: on every process; it names the first value that differs, a rank where it does, and the ``fix``.
        """
        processes.agree(values, fix)

    @contextmanager
    def claim(self, *locks: Lock | None) -> Iterator[None]:
        """Own a command's outputs while inside; rank 0 holds the locks for all.

        Raises:
            UserError: on every process; another command owns one of them.
        """
        with ExitStack() as held:
            self.from_main(lambda: held.enter_context(claim(*locks)))
            yield

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

        The others find their peer gone in the middle of a collective, which is no news, unless it could say nothing:
        then they say in one line that it is gone or silent.
        """
        try:
            yield
        except Exception as met:
            if self.world == 1:
                raise
            error = self._about_a_peer(met)
            try:
                error.speaks = _store().add(_FAILURES, 1) == 1
            except RuntimeError:  # the process that keeps the store has gone, and has said why
                error.speaks = False
            if error.speaks or isinstance(error, (UserError, OSError)):
                raise error from None
            raise SystemExit(1) from None

    def _about_a_peer(self, error: Exception) -> Exception:
        """Return what to say where gloo found another process gone or silent, else the error as it is."""
        if isinstance(error, RuntimeError) and "Timed out waiting" in str(error):
            minutes = self.timeout.total_seconds() / 60
            return UserError(f"another process has been silent for {minutes:.4g} minutes (train.timeout_minutes in "
                             "training): it hangs, is stopped, or its machine cannot be reached; look there, then run "
                             "the same command again")
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _GONE):
            return UserError("another process has gone: it has said why, or the system has killed it, as it does where "
                             "memory runs out; mend that and run the same command again")
        return error

    def failed(self) -> bool:
        """Return whether a process has failed within :meth:`one_voice`."""
        return self.world > 1 and _store().check([_FAILURES])

    def leave(self) -> None:
        """Leave the process group, at the end of a command."""
        if dist.is_initialized():
            dist.destroy_process_group()


def check_launcher(environment: Mapping[str, str]) -> None:
    """Raise :class:`UserError` where each of several Slurm tasks would take itself for the only process of a run.

    ``srun python train.py`` starts as many whole runs as there are tasks. A batch script and a shell of ``salloc`` are
    one process each, however many tasks the job may have: only srun counts those of a step.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    launched = "RANK" in environment and "WORLD_SIZE" in environment
    if tasks.isdecimal() and int(tasks) > 1 and not launched:
        raise UserError(f"Slurm runs {tasks} tasks (SLURM_STEP_NUM_TASKS) and no launcher has told this one its rank: "
                        "each would behave as the whole run; start one torchrun per node: srun --ntasks-per-node=1 "
                        "torchrun --nnodes $SLURM_NNODES --nproc-per-node GPUS ... (docs/distributed.md); for one "
                        "process: srun --ntasks=1")


def _check_devices() -> None:
    """Raise :class:`UserError` where torchrun's process has no GPU of its own; the first of several such ones says so.

    Other launchers may show each process one GPU alone.
    """
    rank, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if "TORCHELASTIC_RUN_ID" in os.environ and 0 < found <= rank:
        error = UserError(f"this machine has {found} CUDA devices, and {os.environ.get('LOCAL_WORLD_SIZE', 'more')} "
                          f"processes were started on it; give --nproc-per-node {found}, or hide the GPUs "
                          "(CUDA_VISIBLE_DEVICES=) to run on CPUs")
        error.speaks = rank == found
        raise error


def _store() -> dist.Store:
    """Return the key-value store at which the processes met; it works where collectives no longer do."""
    return dist.distributed_c10d._get_default_store()
