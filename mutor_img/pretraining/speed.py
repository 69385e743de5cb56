"""How fast updates of a run are on a device: time, idle share, kernels and memory, measured on random codes."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mutor_img.common.errors import UserError
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.memory import step_memory
from mutor_img.pretraining.plan import GIB, gpu_step, planned_cost
from mutor_img.pretraining.rehearsal import random_run, random_task
from mutor_img.registers import RegisterLaw
from mutor_img.training.hardware import peak_flops
from mutor_img.training.runtime import Runtime
from mutor_img.training.trainer import Trainer

WARM_UP = 3  # updates that compile and allocate
PROFILED = 3  # updates that the profiler watches, after the timed ones: watching slows the CPU down


@dataclass(frozen=True)
class Speed:
    """Updates on a device, measured.

    Attributes:
        sequences: of an update.
        seconds: of an update, the median.
        flops: of the model in an update, forward and backward.
        peak: FLOP/s of the device at best; None: not known.
        busy: seconds of an update in which the device computed or copied.
        kernels: that an update ran on the device, copies included; 0: the profiler saw none.
        held: GiB at the worst moment; None: the device does not count them.
        planned: GiB that ``--dry-run`` says.
        planned_mfu: what the cost model says of such an update on an H100.
        first_loss: the next-token loss before anything was learned.
    """

    sequences: int
    seconds: float
    flops: float
    peak: float | None
    busy: float
    kernels: float
    held: float | None
    planned: float
    planned_mfu: float
    first_loss: float

    @property
    def mfu(self) -> float | None:
        """The share of the peak that the model's FLOPs reach."""
        return self.flops / self.seconds / self.peak if self.peak else None

    @property
    def idle(self) -> float | None:
        """The share of an update in which the device waited; None: the profiler saw nothing."""
        return max(0.0, 1 - self.busy / self.seconds) if self.kernels else None


def require_gpu(what: str) -> torch.device:
    """Return this machine's first GPU.

    Args:
        what: says who asks, as in "these checks need".

    Raises:
        UserError: there is none.
    """
    if not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} sees no CUDA device, and {what} one; on a machine with a GPU look "
                        "at what nvidia-smi says and whether torch was installed with CUDA")
    return torch.device("cuda:0")


def measure_speed(runtime: Runtime, law: RegisterLaw, *, preset: str = "B", batch: int = 32, rounds: int = 10,
                  vocabulary: int = 16384, checkpointing: bool = False) -> Speed:
    """Measure whole compiled updates in bf16; where they do not fit, with half as many sequences, and so on.

    Args:
        runtime: a process alone on its device.
        law: the registers.
        preset: size of the model.
        batch: sequences per update, at most.
        rounds: updates that are timed.
        vocabulary: number of codes.
        checkpointing: activations are computed again in the backward pass.
    """
    while True:
        with tempfile.TemporaryDirectory() as folder:
            config = random_run(Path(folder), law, model={"preset": preset, "vocabulary": vocabulary, "classes": 10},
                                train={"global_batch": batch, "activation_checkpointing": checkpointing})
            try:
                return _measure(config, runtime, rounds)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
        batch //= 2  # outside of the handler, whose traceback holds on to the tensors
        forget_all()


def _measure(config: GeneratorConfig, runtime: Runtime, rounds: int) -> Speed:
    device, batch, times = runtime.device, config.train.global_batch, []
    gpu = device.type == "cuda"
    trainer = Trainer(random_task(config, runtime), config, runtime)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for number in range(WARM_UP + rounds):
        begun = time.perf_counter()
        logged = trainer.update()
        _wait(device)
        times.append(time.perf_counter() - begun)
        if number == 0:
            first_loss = logged["next_token"]
    held = torch.cuda.max_memory_allocated(device) / GIB if gpu else None
    busy, kernels = watched(trainer.update, PROFILED, device)
    flops = batch * trainer.task.flops_per_sample(trainer.step)
    memory = step_memory(trainer.model.config, trainer.model.parameter_count(),
                         replace(gpu_step(config), sequences=batch))
    cost = planned_cost(config, trainer.model, trainer.model.objective)
    return Speed(batch, statistics.median(times[WARM_UP:]), flops, peak_flops(device, "bf16") if gpu else None, busy,
                 kernels, held, memory.total / GIB, cost.mfu, first_loss)


def watched(work: Callable[[], object], times: int, device: torch.device) -> tuple[float, float]:
    """Return how many seconds the device is busy in one call of ``work``, and how many kernels it runs in it.

    On a GPU the profiler notes kernels and copies only, on a CPU the innermost operations.
    """
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(times):
            work()
        _wait(device)
    where = DeviceType.CUDA if gpu else DeviceType.CPU
    spans = [(event.time_range.start, event.time_range.end) for event in profiler.events()
             if event.device_type == where and not event.is_user_annotation and not event.cpu_children]
    return covered(spans) / 1e6 / times, len(spans) / times


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans (start, end): kernels of several streams run side by side."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def forget_all() -> None:
    """Free what an earlier model compiled and held on the device."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
