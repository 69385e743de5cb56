"""What the training loop needs to know of a job: the generator and the tokenizer are two such tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn


class Task:
    """A model, its data and its loss. The loop owns everything else: processes, optimiser, EMA, files.

    Attributes:
        model: what is trained, averaged and checkpointed.
        unit: what throughput counts, e.g. ``"tokens"``.
        units_per_sample: units a sample costs in one update.
        flops_per_sample: training FLOPs of one sample (forward and backward), for MFU.
        headline: names of the logged values that a log line and the loss curve show, in order.
    """

    model: nn.Module
    unit: str
    units_per_sample: int
    flops_per_sample: float
    headline: tuple[str, ...]

    def loss(self, model: nn.Module, step: int, samples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this micro-batch's share of the global loss, and shares of what is logged.

        Args:
            model: the model to call: ``self.model``, perhaps wrapped by DDP or compiled.
            step: number of the update, from 0.
            samples: (b,) int64 global sample numbers, ``step * global_batch`` and up, on the device.

        Every returned tensor is a scalar, already divided by global counts: the sum over micro-batches and
        processes is the value for the global batch.
        """
        raise NotImplementedError(type(self).__name__)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Return scores on held-out data; runs on every process, with gradients off and eval mode on."""
        return {}

    def draw_pictures(self, model: nn.Module, folder: Path, step: int) -> None:
        """Write pictures of what ``model`` can do by now into ``folder``; runs on rank 0."""

    def before_update(self, step: int) -> dict[str, float]:
        """Make the gradients of what the task trains beside the model (e.g. a discriminator), before any weight moves.

        Returns values to log, the same on all ranks. If one of them is not finite, nothing is updated.
        """
        return {}

    def after_update(self, model: nn.Module, step: int) -> dict[str, float]:
        """Mend the model after an update (e.g. dead codes); returns values to log, the same on all ranks."""
        return {}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return what a resume needs beside model and optimiser: groups of named tensors, a checkpoint's files."""
        return {}

    def resume(self, folder: Path) -> None:
        """Restore :meth:`tensors` from a checkpoint folder."""

    def compile(self) -> None:
        """Compile the heavy parts of ``self.model`` in place; called before wrapping."""

    def metadata(self) -> dict[str, Any]:
        """Return what a checkpoint's JSON must say for the model to be built again without this config."""
        raise NotImplementedError(type(self).__name__)
