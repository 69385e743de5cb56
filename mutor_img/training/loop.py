"""The training loop of every task: update, log, save, validate, draw, and stop when asked to."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext, suppress
from typing import Any

import torch
from tqdm import tqdm

from mutor_img.common.config import record
from mutor_img.common.files import remove, write_atomic
from mutor_img.training.compiling import compile_settings
from mutor_img.training.log import RunLog
from mutor_img.training.runtime import Runtime
from mutor_img.training.stopping import Stopped, StopRequest
from mutor_img.training.task import Task
from mutor_img.training.trainer import Trainer
from mutor_img.training.updates import Updates

TO_EVALUATE = ".to_evaluate"  # in a run folder: the step whose validation, scores and pictures are not all done


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
        evaluated = not runtime.from_main(lambda: _is_left(trainer))
    if trainer.step >= config.train.steps and evaluated:
        if runtime.is_main:
            more = f", more than train.steps={config.train.steps}" if trainer.step > config.train.steps else ""
            print(f"{config.run_dir}: all {trainer.step} updates are done already{more}; nothing to do"
                  + "".join(f"; not applied: {change}" for change in trainer.changes))
        return trainer
    if runtime.is_main:
        _record(trainer)  # before a tracker that may not begin: what it leaves must not look like a stranger's folder
    log = RunLog(config, trainer.step, evaluated) if runtime.is_main else None
    try:
        _run(trainer, log, stop, evaluated)
    finally:
        if log:
            log.close()
    if runtime.is_main and (trainer.step < config.train.steps or _is_left(trainer)):
        print(f"stopped after update {trainer.step}; to resume, run the same command again")
    return trainer


def _record(trainer: Trainer) -> None:
    """Write the resolved config; where a resume changed it, the earlier one stays under the step it led to."""
    path = trainer.run_dir / "config.yaml"
    earlier = path.with_name(f"config_until_{trainer.step:08d}.yaml")
    if trainer.step:
        print(f"{trainer.run_dir}: going on after update {trainer.step}"
              + "".join(f"; {change}" for change in trainer.changes))
    if trainer.changes and path.is_file() and not earlier.exists():  # a killed sitting has set it aside already
        os.replace(path, earlier)
    write_atomic(path, lambda aside: aside.write_text(record(trainer.config)))


def _is_left(trainer: Trainer) -> bool:
    """Tell whether a kill or a signal came before this step's validation, scores and pictures were all done."""
    path = trainer.run_dir / TO_EVALUATE
    return path.is_file() and path.read_text() == f"{trainer.step}\n"


def _run(trainer: Trainer, log: RunLog | None, stop: StopRequest, evaluated: bool) -> None:
    """Update until done or stopped; log, save, validate and draw on the way.

    Without ``evaluated`` it begins with the validation, scores and pictures of the last update.
    """
    train, alone, first = trainer.config.train, trainer.runtime.world == 1, trainer.step
    bar = tqdm(total=train.steps, initial=first, desc=trainer.run_dir.name, unit="step", disable=not log,
               mininterval=1.0, dynamic_ncols=True)
    if log and train.compile and trainer.step < train.steps:
        bar.write("compiling at the first update: it takes longer than the others, about a minute on CPUs")
    updates = Updates(trainer, log, bar)
    if not evaluated:
        _evaluate(trainer, log, bar, stop)
    while trainer.step < train.steps and not updates.stop and not (alone and stop.seen):
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
        looking = _evaluates(trainer)
        arrived = updates.arrived(everything=saving or looking)
        trainer.seconds += time.perf_counter() - begun
        bar.update()
        for number, values in arrived:
            updates.tell(number, values)
        if _due(step, train.check_ranks_every, False):
            trainer.compare_ranks()
        if log and looking:
            write_atomic(trainer.run_dir / TO_EVALUATE, lambda aside, step=step: aside.write_text(f"{step}\n"))
        if saving:
            trainer.save()  # before what may take long
        _evaluate(trainer, log, bar, stop)
    for number, values in updates.arrived(everything=True):
        updates.tell(number, values)
    if trainer.saved_step < trainer.step:
        trainer.save()
    if log and trainer.step < train.steps:
        log.draw(trainer.task.headline)
    bar.close()


def _due(step: int, every: int, done: bool) -> bool:
    """Tell whether something done every so many steps, and at the end, is due; 0 means never."""
    return every > 0 and (done or step % every == 0)


def _evaluates(trainer: Trainer) -> bool:
    """Tell whether this step is due for a validation, a score or pictures, or is the last one."""
    train, step = trainer.config.train, trainer.step
    return step == train.steps or any(
        _due(step, every, False) for every in (train.validate_every, trainer.task.score_every, train.picture_every))


def _evaluate(trainer: Trainer, log: RunLog | None, bar: tqdm, stop: StopRequest) -> None:
    """Validate, score and draw, where this step is due for it.

    A signal to a process that is alone ends it; the same command, run again, does it then.
    """
    with suppress(Stopped), stop.at_once() if trainer.runtime.world == 1 else nullcontext():
        _validate_score_draw(trainer, log, bar)
        if log and _evaluates(trainer):
            remove(trainer.run_dir / TO_EVALUATE)


def _validate_score_draw(trainer: Trainer, log: RunLog | None, bar: tqdm) -> None:
    """Do what :func:`_evaluate` is for."""
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
    if log and (done or _due(step, train.checkpoint_every, False)):
        log.draw(task.headline)


def _note(log: RunLog | None, bar: tqdm, step: int, scores: dict[str, float]) -> None:
    """Log scores, and show them."""
    if log and scores:
        log.write(step, scores)
        bar.write(f"step {step}: " + " · ".join(f"{k} {v:.4g}" for k, v in scores.items()))
