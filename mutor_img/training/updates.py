"""The updates that a device was told to do, until their numbers are there: then they are judged, logged and told of."""

from __future__ import annotations

from collections import deque

import torch
from tqdm import tqdm

from mutor_img.training.hardware import peak_flops
from mutor_img.training.log import RunLog, log_line
from mutor_img.training.numbers import Sent
from mutor_img.training.trainer import Trainer


def behind(device: torch.device) -> int:
    """Return how many updates may be under way: on a GPU one, so that it has work while the CPU looks at the last."""
    return 1 if device.type == "cuda" else 0


class Updates:
    """The updates of one sitting.

    Attributes:
        stop: whether a process was asked to stop, as all processes know from one update's sums.
    """

    def __init__(self, trainer: Trainer, log: RunLog | None, bar: tqdm):
        self.stop, self._trainer, self._log, self._bar = False, trainer, log, bar
        self._sent: deque[tuple[int, Sent]] = deque()
        self._peak = peak_flops(trainer.runtime.device, trainer.config.train.precision, trainer.task.operation)
        self._logged = trainer.step, trainer.seconds  # at the last log line

    def add(self, values: dict) -> None:
        """Take in what :meth:`Trainer.apply` has just returned."""
        self._sent.append((self._trainer.step, Sent(values)))

    def arrived(self, everything: bool) -> list[tuple[int, dict[str, float]]]:
        """Return steps and numbers of the updates that are done, oldest first; waits for all but those under way.

        Args:
            everything: nothing is to be under way after this: something looks at the weights, or saves them.
        """
        left = 0 if everything else behind(self._trainer.runtime.device)
        return [(step, sent.read()) for step, sent in (self._sent.popleft() for _ in range(len(self._sent) - left))]

    def tell(self, step: int, values: dict[str, float]) -> None:
        """Judge one update by its numbers, log it where that is due, and say what is odd about it.

        Raises:
            UserError: as :meth:`Trainer.judge`.
        """
        trainer, task, log = self._trainer, self._trainer.task, self._log
        train = trainer.config.train
        self.stop = self.stop or values.pop("stop") >= 1
        skipped = trainer.judge(step, values)
        if log is None:
            return
        if skipped:
            self._bar.write(f"warning: {skipped}")
            log.write(step, {"skipped": len(trainer.skipped)})
            return
        if doubt := task.doubt(step, values):
            self._bar.write(f"warning: {doubt}")
        if step == train.steps or step % train.log_every == 0 or step == 1:
            done, seconds = step - self._logged[0], trainer.seconds - self._logged[1]
            rate = done * train.global_batch / max(1e-9, seconds)  # samples per second
            values |= {"samples": step * train.global_batch, f"{task.unit}_per_second": rate * task.units_per_sample}
            if self._peak:
                values["mfu"] = rate * task.flops_per_sample(step - 1) / self._peak / trainer.runtime.world
            log.write(step, values)
            self._bar.write(log_line(values, step, train.steps, task, seconds / done))
            self._logged = step, trainer.seconds
