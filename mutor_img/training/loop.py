"""The training loop of every task: one function, the same on one CPU and on many GPUs.

Random numbers are functions of (seed, step, sample) or, for dropout, of (seed, step, rank), and the data order is a
function of the sample number. So "to resume, run the same command again" gives the bytes of an uninterrupted run.
"""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from mutor_img.checkpoint import load_strict, newest_checkpoint, read_meta, read_tensors, write_checkpoint
from mutor_img.config import to_dict, to_yaml
from mutor_img.errors import UserError
from mutor_img.files import write_atomic
from mutor_img.streams import Stream, generator_seed
from mutor_img.training.hardware import peak_flops
from mutor_img.training.log import RunLog
from mutor_img.training.optimizer import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors
from mutor_img.training.runtime import Runtime
from mutor_img.training.task import Task


class Trainer:
    """The state of one run: model, averaged model, optimiser, step, seconds.

    Attributes:
        step: updates done.
        seconds: time spent in updates, over all sittings; validation and pictures not counted.
    """

    def __init__(self, task: Task, config: Any, runtime: Runtime):
        """Build everything on the device and resume from the newest complete checkpoint of ``config.run_dir``.

        Args:
            task: the job.
            config: has ``run_dir``, ``seed``, ``optim`` and ``train``.
            runtime: this process.

        Raises:
            UserError: a batch that does not divide, or a checkpoint of another model.
        """
        self.task, self.config, self.runtime = task, config, runtime
        self.run_dir = Path(config.run_dir)
        self.local_batch = runtime.share(config.train.global_batch, "train.global_batch")
        self.micro_batch = config.train.micro_batch or self.local_batch
        if self.local_batch % self.micro_batch:
            raise UserError(f"train.micro_batch is {self.micro_batch}, but each of {runtime.world} processes has "
                            f"{self.local_batch} of the global batch, which is not a multiple of it")
        self.model = task.model.to(runtime.device)
        self.optimizer = build_optimizer(self.model, config.optim)
        # The copy is made before compiling: it serves validation and pictures, whose shapes differ.
        self.ema = None
        if config.train.ema:
            self.ema = ModelEmaV3(self.model, config.train.ema, use_warmup=True, warmup_gamma=9, warmup_power=1)
        self.step, self.seconds = 0, 0.0
        self._resume()
        if config.train.compile:
            task.compile()
        self.wrapped: nn.Module = self.model
        if runtime.world > 1:
            devices = [runtime.device] if runtime.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.model, device_ids=devices, gradient_as_bucket_view=True,
                                                   broadcast_buffers=False)

    def _resume(self) -> None:
        folder = newest_checkpoint(self.run_dir)
        if folder is None:
            return
        meta = read_meta(folder)
        load_strict(self.model, read_tensors(folder, "model"), folder)
        load_optimizer_tensors(self.model, self.optimizer, read_tensors(folder, "optimizer"))
        if self.ema is not None:
            load_strict(self.ema.module, read_tensors(folder, "ema"), folder)
        self.task.resume(folder)
        self.step, self.seconds = meta["step"], meta["seconds"]

    @property
    def best_model(self) -> nn.Module:
        """The averaged model where there is one, else the model."""
        return self.ema.module if self.ema is not None else self.model

    def update(self) -> dict[str, float]:
        """Do one optimiser update over the global batch; returns the logged values, the same on all ranks.

        Raises:
            UserError: a loss or a gradient norm is not finite; the weights have not moved.
        """
        train, runtime = self.config.train, self.runtime
        self.wrapped.train()
        totals: dict[str, Tensor] = {}
        first = self.step * train.global_batch + runtime.rank * self.local_batch
        for offset in range(0, self.local_batch, self.micro_batch):
            samples = torch.arange(first + offset, first + offset + self.micro_batch, device=runtime.device)
            torch.manual_seed(generator_seed(self.config.seed, Stream.DROPOUT, self.step, runtime.rank, offset))
            last = offset + self.micro_batch == self.local_batch
            if runtime.world > 1:
                self.wrapped.require_backward_grad_sync = last  # one all-reduce an update, not one a micro-batch
            with runtime.autocast(train.precision):
                loss, values = self.task.loss(self.wrapped, self.step, samples)
            # DDP averages gradients over processes; each loss is a share of a sum.
            (loss * runtime.world).backward()
            for name, value in {"loss": loss, **values}.items():
                totals[name] = totals.get(name, 0.0) + value.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip or math.inf)
        sums = runtime.sum(torch.stack([totals[name].float() for name in totals]))
        logged = dict(zip((*totals, "gradient_norm"), [*sums.tolist(), norm.item()]))
        logged.update(self.task.before_update(self.step))
        bad = [name for name, value in logged.items() if not math.isfinite(value)]
        if bad:
            raise UserError(f"step {self.step}: {bad[0]} is {logged[bad[0]]}; nothing was updated and "
                            f"{newest_checkpoint(self.run_dir) or 'no checkpoint'} is the last good state; "
                            "lower optim.lr or use train.precision=fp32, then run the same command again")
        lr = learning_rate(self.config.optim, self.step, train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        logged.update(self.task.after_update(self.model, self.step))
        if self.ema is not None:
            self.ema.update(self.model, step=self.step + 2)  # decay (1 + n) / (10 + n) at update n
        self.step += 1
        return {**logged, "lr": lr}

    def save(self) -> None:
        """Write a checkpoint; every process waits for it."""
        if self.runtime.is_main:
            tensors = {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self.model, self.optimizer)}
            if self.ema is not None:
                tensors["ema"] = self.ema.module.state_dict()
            tensors.update(self.task.tensors())
            meta = {"seconds": self.seconds, "samples": self.step * self.config.train.global_batch,
                    **self.task.metadata(), "config": to_dict(self.config)}
            write_checkpoint(self.run_dir, self.step, tensors, meta, self.config.train.keep)
        self.runtime.barrier()


def train(task: Task, config: Any, runtime: Runtime) -> Trainer:
    """Train ``task`` to ``config.train.steps`` updates, from the run's newest checkpoint where there is one.

    Args:
        task: the job; its model is not yet on the device.
        config: a config with ``run_dir``, ``seed``, ``optim`` and ``train``.
        runtime: this process.

    Returns:
        The :class:`Trainer`, whose ``step`` is below ``config.train.steps`` only if a signal asked to stop.
    """
    trainer = Trainer(task, config, runtime)
    if trainer.step >= config.train.steps:
        if runtime.is_main:
            print(f"{config.run_dir}: all {trainer.step} updates are done already; nothing to do")
        return trainer
    log = RunLog(trainer.run_dir, trainer.step) if runtime.is_main else None
    if log:
        write_atomic(trainer.run_dir / "config.yaml", lambda path: path.write_text(to_yaml(config)))
    stop = _StopRequest(runtime)
    try:
        _run(trainer, log, stop)
    finally:
        stop.restore()
        if log:
            log.close()
    if runtime.is_main and trainer.step < config.train.steps:
        print(f"stopped after update {trainer.step}; to resume, run the same command again")
    return trainer


def _run(trainer: Trainer, log: RunLog | None, stop: _StopRequest) -> None:
    """Update until done or stopped; log, validate, draw and save on the way."""
    config, task = trainer.config, trainer.task
    train = config.train
    peak = peak_flops(trainer.runtime.device, train.precision)
    bar = tqdm(total=train.steps, initial=trainer.step, desc=Path(config.run_dir).name, unit="step", disable=not log,
               mininterval=1.0, dynamic_ncols=True)
    mark_step, mark_seconds = trainer.step, trainer.seconds
    while trainer.step < train.steps:
        begun = time.perf_counter()
        values = trainer.update()
        trainer.seconds += time.perf_counter() - begun
        step, done, stopping = trainer.step, trainer.step == train.steps, stop.requested()
        bar.update()
        if log and (done or stopping or step % train.log_every == 0 or step == 1):
            elapsed = max(1e-9, trainer.seconds - mark_seconds)
            rate = (step - mark_step) * train.global_batch / elapsed  # samples a second
            values["samples"] = step * train.global_batch
            values[f"{task.unit}_per_second"] = rate * task.units_per_sample
            if peak:
                values["mfu"] = rate * task.flops_per_sample / peak / trainer.runtime.world
            log.write(step, values)
            bar.write(_log_line(values, step, train.steps, task, elapsed / (step - mark_step)))
            mark_step, mark_seconds = step, trainer.seconds
        if _due(step, train.validate_every, done):
            scores = _validate(trainer)
            if log and scores:
                log.write(step, scores)
                bar.write(f"step {step}: " + " · ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        if stopping or done or _due(step, train.checkpoint_every, done):
            trainer.save()
            if log:
                log.draw(task.headline)
        if log and _due(step, train.picture_every, done):
            trainer.best_model.eval()
            with torch.no_grad():
                task.draw_pictures(trainer.best_model, trainer.run_dir / "pictures", step)
        if stopping:
            break
    bar.close()


def _due(step: int, every: int, done: bool) -> bool:
    """Tell whether something done every so many steps, and at the end, is due; 0 means never."""
    return every > 0 and (done or step % every == 0)


def _validate(trainer: Trainer) -> dict[str, float]:
    model = trainer.best_model
    model.eval()
    with torch.no_grad(), trainer.runtime.autocast(trainer.config.train.precision):
        return trainer.task.validate(model)


def _log_line(values: dict[str, float], step: int, steps: int, task: Task, seconds_a_step: float) -> str:
    """Return one line: step, samples, losses, gradient norm, lr, throughput, MFU, ETA."""
    left = int(seconds_a_step * (steps - step))
    parts = [f"step {step}/{steps}", f"samples {values['samples']}"]
    parts += [f"{name} {values[name]:.4f}" for name in task.headline if name in values]
    parts += [f"grad {values['gradient_norm']:.3f}", f"lr {values['lr']:.2e}",
              f"{values[f'{task.unit}_per_second']:,.0f} {task.unit}/s"]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    return " · ".join([*parts, f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"])


class _StopRequest:
    """SIGTERM or SIGINT asks for a checkpoint at the next step; all processes agree on which step that is."""

    def __init__(self, runtime: Runtime):
        self.seen = False
        # A CPU group: agreeing must not wait for the GPU.
        self.group = dist.new_group(backend="gloo") if runtime.world > 1 else None
        self.previous = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        self.seen = True

    def requested(self) -> bool:
        """Return whether any process was asked to stop."""
        if self.group is None:
            return self.seen
        flag = torch.tensor([int(self.seen)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())

    def restore(self) -> None:
        """Put the former signal handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
