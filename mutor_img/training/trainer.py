"""What a run consists of at one moment, and one update of it: the same on one CPU and on many GPUs.

Random numbers are functions of (seed, step, sample), and the data order is a function of the sample number. So "to
resume, run the same command again" gives the bytes of an uninterrupted run, and another number of processes gives its
loss curve up to rounding. So does another micro-batch, where a task's loss is a sum over samples.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mutor_img.checkpoints.folder import newest_checkpoint, open_group, read_meta, tidy, write_checkpoint
from mutor_img.common.errors import UserError
from mutor_img.common.files import file_hash
from mutor_img.common.processes import check_shared, share_mistake
from mutor_img.training import parallel
from mutor_img.training.changes import check_changes, require_group
from mutor_img.training.numbers import read_numbers
from mutor_img.training.optimizer import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    take_step,
)
from mutor_img.training.runtime import Runtime
from mutor_img.training.stopping import StopRequest
from mutor_img.training.task import Task

WINDOW = 1000  # the updates among which train.skip_bad_updates counts
_REMEDY = "lower optim.lr or use train.precision=fp32, then run the same command again"


class Trainer:
    """The state of one run: model, averaged model, optimiser, step, seconds.

    Attributes:
        step: updates done.
        seconds: time spent in updates, over all sittings; validation and pictures not counted.
        devices: what it was spent on, in order; one, unless the run was carried to another machine.
        skipped: those of the last updates that were skipped, as the number of updates done with each.
        changes: settings that differ from those of the checkpoint that it resumed from, a phrase each.
    """

    def __init__(self, task: Task, config: Any, runtime: Runtime):
        """Build everything on the device and resume from the newest complete checkpoint of ``config.run_dir``.

        Args:
            task: the job.
            config: has ``run_dir``, ``seed``, ``optim`` and ``train``.
            runtime: this process.

        Raises:
            UserError: a batch that does not divide, a checkpoint of another run or model, or processes that differ in
                config, codes or checkpoint.
        """
        self.task, self.config, self.runtime = task, config, runtime
        self.run_dir = Path(config.run_dir)
        folder = self._common_checkpoint()
        self.local_batch, self.micro_batch = config.train.shares(runtime.world, f"{runtime.world} processes")
        if config.train.parallel == "fsdp" and not task.shardable:
            raise UserError("train.parallel is 'fsdp', which is for generators; give train.parallel=ddp")
        self.sharded = parallel.is_sharded(config.train, runtime)
        self.model = task.model if self.sharded else task.model.to(runtime.device)  # sharding moves block by block
        self._blank = parallel.blank_copy(self.model) if self.sharded else None
        # The average is of the plain model: it serves validation and pictures, whose shapes differ.
        self.ema = None
        if config.train.ema:
            from timm.utils import ModelEmaV3  # seconds to import

            self.ema = ModelEmaV3(self.model, config.train.ema, use_warmup=True, warmup_gamma=9, warmup_power=1)
        blocks = task.blocks(self.model)
        parallel.prepare_blocks(blocks, config.train)
        self.wrapped = parallel.distribute(self.model, blocks, config.train, runtime)
        if self.ema is not None and self.sharded:
            parallel.shard(self.ema.module, task.blocks(self.ema.module), config.train, runtime)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.step, self.seconds, self.saved_step, self.skipped, self.changes = 0, 0.0, 0, [], []
        self.devices = [runtime.devices]
        if folder is not None:
            self._resume(folder)

    def _common_checkpoint(self) -> Path | None:
        """Return the checkpoint to go on from, or None: rank 0's newest, once all processes see the same one.

        Raises:
            UserError: on every process; one of them has another config or other codes, or sees another checkpoint.
        """
        self.runtime.agree(asdict(self.config))
        self.runtime.agree(self.task.metadata())
        name = self.runtime.from_main(lambda: (newest := tidy(self.run_dir)) and newest.name)
        folder = self.run_dir / "checkpoints" / name if name else newest_checkpoint(self.run_dir)
        seen = folder is not None and (folder / "checkpoint.json").is_file()
        self.runtime.agree({"the step of the checkpoint to go on from": read_meta(folder)["step"] if seen else None,
                            "the hash of its checkpoint.json": file_hash(folder / "checkpoint.json") if seen else None},
                           f"run_dir={self.run_dir} must be one folder, on a disk that all nodes see")
        if not seen:  # else it is
            check_shared(self.run_dir, "run_dir")
        return folder

    def _resume(self, folder: Path) -> None:
        meta, rank, world = read_meta(folder), self.runtime.rank, self.runtime.world
        for group in ("model", "optimizer"):
            require_group(meta, group, folder, "it holds only weights, no run to continue; give another run_dir, "
                                               f"and init_from={folder}")
        self.changes = check_changes(meta, self.metadata(), folder)
        if self.ema is not None:
            require_group(meta, "ema", folder, f"train.ema was 0.0, now it is {self.config.train.ema}; give "
                                             f"train.ema=0.0, or another run_dir with init_from={folder}")
        parallel.load_model(self.model, open_group(folder, "model", rank, world))
        load_optimizer_tensors(self.model, self.optimizer, open_group(folder, "optimizer", rank, world))
        if self.ema is not None:
            parallel.load_model(self.ema.module, open_group(folder, "ema", rank, world))
        self.task.resume(folder)
        self.step, self.seconds, self.saved_step = meta["step"], meta["seconds"], meta["step"]
        self.skipped = meta.get("skipped", [])
        self.devices = list(dict.fromkeys([*meta.get("devices", []), *self.devices]))

    @property
    def best_model(self) -> nn.Module:
        """The averaged model where there is one, else the model."""
        return self.ema.module if self.ema is not None else self.model

    def whole_model(self, everywhere: bool = True) -> nn.Module | None:
        """Return :attr:`best_model` unsharded, in eval mode; all processes call this.

        Args:
            everywhere: False: on rank 0 only, None elsewhere.
        """
        model, wanted = self.best_model, everywhere or self.runtime.is_main
        if self.sharded:
            model = parallel.gather(model, self._blank, self.runtime, wanted)
        return model.eval() if wanted else None

    def update(self) -> dict[str, float]:
        """Do one optimiser update over the global batch and wait for it; returns the logged values.

        Raises:
            UserError: as :meth:`judge`.
        """
        values = read_numbers(self.apply(self.gradients()))
        self.judge(self.step, values)
        return values

    def gradients(self, stop: StopRequest | None = None) -> dict[str, Tensor]:
        """Make the clipped gradients of the global batch. Nothing that is saved moves.

        Args:
            stop: whether this process was asked to stop.

        Returns:
            Scalars on the device, the same on all ranks: what is logged of the gradients, and with ``stop`` under this
            name how many processes were asked to. Neither here nor in :meth:`apply` does the CPU wait for the device.
        """
        train, runtime = self.config.train, self.runtime
        average = self.ema.module if self.ema is not None else None
        self.wrapped.train()
        totals: dict[str, Tensor] = {}
        first = self.step * train.global_batch + runtime.rank * self.local_batch
        for offset in range(0, self.local_batch, self.micro_batch):
            samples = torch.arange(first + offset, first + offset + self.micro_batch)
            last = offset + self.micro_batch == self.local_batch
            parallel.reduce_gradients(self.wrapped, now=last)
            with runtime.autocast(train.precision):
                loss, values = self.task.loss(self.wrapped, self.step, samples, average)
            # DDP and FSDP2 average gradients over processes; each loss is a share of a sum.
            (loss * runtime.world).backward()
            for name, value in {"loss": loss, **values}.items():
                totals[name] = totals.get(name, 0.0) + value.detach()
        norm = clip_gradients(self.model.parameters(), self.config.optim.clip)
        if stop is not None:
            totals["stop"] = torch.full((), float(stop.seen), device=runtime.device)
        sums = runtime.sum(torch.stack([total.float() for total in totals.values()]))
        return {**dict(zip(totals, sums)), "gradient_norm": norm, **self.task.before_update(self.step)}

    def apply(self, values: dict[str, Tensor]) -> dict[str, float | Tensor]:
        """Do the update whose gradients are made: weights move, and the average after them.

        Where one of ``values`` is not finite, the update is skipped. It counts as done, and nothing that is saved
        moves. The device decides this, and the CPU learns of it later, by :meth:`judge`.

        Args:
            values: of :meth:`gradients`.

        Returns:
            ``values`` and more to log, and under ``skipped`` whether this update was.
        """
        skipped = ~torch.stack([value.float() for value in values.values()]).isfinite().all()  # () bool
        lr = learning_rate(self.config.optim, self.step, self.config.train.steps)
        take_step(self.optimizer, lr, skipped)
        after = self.task.after_update(self.model, self.step, skipped)
        if self.ema is not None:
            self._average(skipped)
        self.step += 1
        return {**values, **after, "lr": lr, "skipped": skipped}

    @torch.no_grad()
    def _average(self, skipped: Tensor) -> None:
        """Move the averaged model towards the model, as ModelEmaV3 does; where ``skipped``, it stays.

        But the average of a weight that is itself NaN becomes NaN, too: 0 * NaN is. Neither is ever saved.
        """
        share = ~skipped * (1.0 - self.ema.get_decay(self.step + 2))  # decay (1 + n) / (10 + n) at update n
        averages, weights = (parallel.held(model.state_dict()) for model in (self.ema.module, self.model))
        torch._foreach_lerp_(list(averages.values()), list(weights.values()), [share] * len(averages))

    def judge(self, step: int, values: dict[str, float]) -> str | None:
        """Look at what update number ``step``, from 1, has computed, and take ``skipped`` out of it.

        Args:
            step: the updates done with it.
            values: those of :meth:`apply`, read from the device.

        Returns:
            None, or of an update that was skipped what to tell.

        Raises:
            UserError: it was skipped, and no more may be.
        """
        if values.pop("skipped") != 1:
            return None
        fault = next(f"{name} is {value}" for name, value in values.items() if not math.isfinite(value))
        self.skipped = [done for done in self.skipped if done > step - WINDOW] + [step]
        most = self.config.train.skip_bad_updates
        if len(self.skipped) > most:
            enough = f", {most} of the {WINDOW} updates before were skipped already," if most else ""
            raise UserError(f"step {step - 1}: {fault}; nothing was updated{enough} and {self._last_good()}; "
                            f"{_REMEDY}")
        return (f"step {step}: {fault}; this update was skipped (train.skip_bad_updates: {len(self.skipped)} of {most} "
                f"in {WINDOW} updates)")

    def compare_ranks(self) -> None:
        """Check that all processes hold the same weights, average, optimiser state and task's tensors; all call this.

        Raises:
            UserError: on every process; a memory or a processor of one of them has failed.
        """
        held = {"model": dict(self.model.named_parameters()),
                "optimizer": optimizer_tensors(self.model, self.optimizer)}
        if self.ema is not None:
            held["ema"] = dict(self.ema.module.named_parameters())
        held |= self.task.tensors()
        found = parallel.other_copy(_flat(held), self.runtime)
        share_mistake(found and f"step {self.step}: {found} of rank {self.runtime.rank} is not that of rank 0: a "
                                f"memory or a processor has failed; nothing was saved and {self._last_good()}; "
                                "check both machines, then run the same command again")

    def _refuse_broken(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Raise :class:`UserError` on every process where one of them would save a number that is not finite."""
        bad = parallel.not_finite(_flat(tensors), self.runtime)
        share_mistake(bad and f"step {self.step}: {bad} holds NaN or infinity; nothing was saved and "
                              f"{self._last_good()}; {_REMEDY}")

    def _last_good(self) -> str:
        newest = newest_checkpoint(self.run_dir)
        return f"{newest} is the last good state" if newest else "there is no checkpoint to go back to"

    def metadata(self) -> dict[str, Any]:
        """Return what a checkpoint's JSON says of the run, whatever its step."""
        return {**self.task.metadata(), "config": asdict(self.config)}

    def save(self) -> None:
        """Write a checkpoint, each process its rows; every process waits for it."""
        tensors = {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self.model, self.optimizer)}
        if self.ema is not None:
            tensors["ema"] = self.ema.module.state_dict()
        tensors.update(self.task.tensors())
        self._refuse_broken(tensors)
        meta = {"seconds": self.seconds, "devices": self.devices, "skipped": self.skipped,
                "samples": self.step * self.config.train.global_batch, **self.metadata()}
        rows = {group: parallel.as_slices(content, self.runtime) for group, content in tensors.items()}
        train = self.config.train
        write_checkpoint(self.run_dir, self.step, rows, meta, train.keep, self.runtime, train.milestones)
        self.saved_step = self.step


def _flat(groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of all groups, by names that a message may use."""
    return {f"{group} {name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
