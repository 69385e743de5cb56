"""What the training loop needs to know of a job: the generator and the tokenizer are two such tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class Task(ABC):
    """A model, its data and its loss. The loop owns everything else: processes, optimiser, EMA, files.

    Attributes:
        model: what is trained, averaged and checkpointed.
        unit: what throughput counts, e.g. ``"tokens"``.
        units_per_sample: units that a sample costs in one update.
        operation: what most of its FLOPs are of, "matmul" or "conv".
        headline: names of the logged values that a log line and the loss curve show, in order.
        score_every: steps between calls of :meth:`score`, and at the end; 0: never.
        shardable: FSDP2 may shard the model: the task touches its weights by calling it only.
    """

    model: nn.Module
    unit: str
    units_per_sample: int
    operation: str = "matmul"
    headline: tuple[str, ...]
    score_every: int = 0
    shardable: bool = False

    @abstractmethod
    def loss(self, model: nn.Module, step: int, samples: Tensor,
             average: nn.Module | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this micro-batch's share of the global loss, and shares of what is logged.

        Args:
            model: the model to call: ``self.model``, perhaps wrapped by DDP or compiled.
            step: number of the update, from 0.
            samples: (b,) int64 global sample numbers, ``step * global_batch`` and up, on the CPU: reading what they
                stand for must not wait for the GPU.
            average: the averaged model, in eval mode; None where the run has none.

        Every returned tensor is a scalar, already divided by global counts: the sum over micro-batches and
        processes is the value for the global batch.
        """

    @abstractmethod
    def flops_per_sample(self, step: int) -> float:
        """Return the training FLOPs of one sample (forward and backward) in update ``step``, for MFU."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Return scores on held-out data; runs on every process, with gradients off and eval mode on."""
        return {}

    def score(self, model: nn.Module, step: int) -> dict[str, float]:
        """Return scores of what ``model``, whole on every process, can do by now; all call this."""
        return {}

    def draw_pictures(self, model: nn.Module, folder: Path, step: int) -> None:
        """Write pictures of what ``model`` can do by now into ``folder``; runs on rank 0."""
        return

    def doubt(self, step: int, values: Mapping[str, float]) -> str | None:
        """Return what looks wrong after ``step`` updates, for a warning; ``values`` are what the last one logs."""
        return None

    def before_update(self, step: int) -> dict[str, Tensor]:
        """Make the gradients of what the task trains beside the model (e.g. a discriminator), before any weight moves.

        Returns scalars to log, the same on all ranks. If one of them is not finite, the update is skipped.
        """
        return {}

    def after_update(self, model: nn.Module, step: int, skipped: Tensor) -> dict[str, Tensor]:
        """Mend the model after an update (e.g. dead codes); returns scalars to log, the same on all ranks.

        Nothing here may read from the device, nor move where the update is skipped.

        Args:
            model: this task's.
            step: number of the update, from 0.
            skipped: () bool, on the device.
        """
        return {}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return what a resume needs beside model and optimiser: groups of named tensors, a checkpoint's files."""
        return {}

    def resume(self, folder: Path) -> None:
        """Restore :meth:`tensors` from a checkpoint folder."""
        return

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return the heavy parts of ``model`` (this task's, or its average): checkpointed, compiled, sharded each."""
        return []

    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """Return what a checkpoint's JSON must say for the model to be built again without this config."""
