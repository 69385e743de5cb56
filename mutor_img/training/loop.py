"""The training loop of every task: update, log, save, validate, draw, and stop when asked to."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext, suppress
from typing import Any

import torch
from tqdm import tqdm

from mutor_img.common.config import record
from mutor_img.common.files import write_atomic
from mutor_img.training.compiling import compile_settings
from mutor_img.training.log import RunLog
from mutor_img.training.runtime import Runtime
from mutor_img.training.stopping import Stopped, StopRequest
from mutor_img.training.task import Task
from mutor_img.training.trainer import Trainer
from mutor_img.training.updates import Updates


def train(task: Task, config: Any, runtime: Runtime, stop: StopRequest | None = None) -> Trainer:
    """Train ``task`` to ``config.train.steps`` updates, from the run's newest checkpoint where there is one.

    Args:
        task: the job; its model is not yet on the device.
        config: a config with ``run_dir``, ``seed``, ``optim`` and ``train``.
        runtime: this process.
        stop: signals, if the caller notes them already.

    Returns:
        The :class:`Trainer`, whose ``step`` is below ``config.train.steps`` only if a signal asked to stop.

    Raises:
        Stopped: a signal came before there was anything to save.
    """
    if stop is None:
        with StopRequest() as stop:
            return train(task, config, runtime, stop)
    with compile_settings():
        return _train(task, config, runtime, stop)


def _train(task: Task, config: Any, runtime: Runtime, stop: StopRequest) -> Trainer:
    with stop.at_once():
        trainer = Trainer(task, config, runtime)
    if trainer.step >= config.train.steps:
        if runtime.is_main:
            more = f", more than train.steps={config.train.steps}" if trainer.step > config.train.steps else ""
            print(f"{config.run_dir}: all {trainer.step} updates are done already{more}; nothing to do"
                  + "".join(f"; not applied: {change}" for change in trainer.changes))
        return trainer
    log = RunLog(config, trainer.step) if runtime.is_main else None
    if log:
        _record(trainer)
    try:
        _run(trainer, log, stop)
    finally:
        if log:
            log.close()
    if runtime.is_main and trainer.step < config.train.steps:
        print(f"stopped after update {trainer.step}; to resume, run the same command again")
    return trainer


def _record(trainer: Trainer) -> None:
    """Write the resolved config; where a resume changed it, the earlier one stays under the step it led to."""
    path = trainer.run_dir / "config.yaml"
    if trainer.step:
        print(f"{trainer.run_dir}: going on after update {trainer.step}"
              + "".join(f"; {change}" for change in trainer.changes))
    if trainer.changes and path.is_file():
        os.replace(path, path.with_name(f"config_until_{trainer.step:08d}.yaml"))
    write_atomic(path, lambda aside: aside.write_text(record(trainer.config)))


def _run(trainer: Trainer, log: RunLog | None, stop: StopRequest) -> None:
    """Update until done or stopped; log, save, validate and draw on the way."""
    train, task, alone, first = trainer.config.train, trainer.task, trainer.runtime.world == 1, trainer.step
    bar = tqdm(total=train.steps, initial=first, desc=trainer.run_dir.name, unit="step", disable=not log,
               mininterval=1.0, dynamic_ncols=True)
    if log and train.compile:
        bar.write("compiling at the first update: it takes longer than the others, about a minute on CPUs")
    updates = Updates(trainer, log, bar)
    while trainer.step < train.steps and not updates.stop:
        begun = time.perf_counter()
        try:  # One process need not wait for an update's gradients, several not for the first one's, which compiles.
            with stop.at_once() if alone or trainer.step == first else nullcontext():
                values = trainer.gradients(stop)
        except Stopped:
            if trainer.step == first:
                raise
            break
        updates.add(trainer.apply(values))
        step, done = trainer.step, trainer.step == train.steps
        saving = done or _due(step, train.checkpoint_every, False) or step in train.milestones
        looking = any(_due(step, every, done) for every in (train.validate_every, task.score_every,
                                                            train.picture_every))
        arrived = updates.arrived(everything=saving or looking)
        trainer.seconds += time.perf_counter() - begun
        bar.update()
        for number, values in arrived:
            updates.tell(number, values)
        if _due(step, train.check_ranks_every, False):
            trainer.compare_ranks()
        if saving:
            trainer.save()  # before what may take long
        with suppress(Stopped), stop.at_once() if alone else nullcontext():
            _evaluate(trainer, log, bar)
    for number, values in updates.arrived(everything=True):
        updates.tell(number, values)
    if trainer.saved_step < trainer.step:
        trainer.save()
    if log:
        log.draw(task.headline)
    bar.close()


def _due(step: int, every: int, done: bool) -> bool:
    """Tell whether something done every so many steps, and at the end, is due; 0 means never."""
    return every > 0 and (done or step % every == 0)


def _evaluate(trainer: Trainer, log: RunLog | None, bar: tqdm) -> None:
    """Validate, score and draw, where this step is due for it."""
    train, step, task = trainer.config.train, trainer.step, trainer.task
    done = step == train.steps
    # Blocks were compiled for the shapes of training and for its mode: anything else would compile them again.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        if _due(step, train.validate_every, done):
            with trainer.runtime.autocast(train.precision):
                _note(log, bar, step, task.validate(trainer.best_model.eval()))
        if _due(step, task.score_every, done):
            _note(log, bar, step, task.score(trainer.whole_model(), step))
        if _due(step, train.picture_every, done):
            model = trainer.whole_model(everywhere=False)
            if model is not None:
                task.draw_pictures(model, trainer.run_dir / "pictures", step)
                log.show(trainer.run_dir / "pictures", step)
    if log and _due(step, train.checkpoint_every, False):
        log.draw(task.headline)


def _note(log: RunLog | None, bar: tqdm, step: int, scores: dict[str, float]) -> None:
    """Log scores, and show them."""
    if log and scores:
        log.write(step, scores)
        bar.write(f"step {step}: " + " · ".join(f"{k} {v:.4g}" for k, v in scores.items()))
