"""The interface of all objectives, which is next-token prediction as it stands."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mutor_img.blocks import ModelConfig
from mutor_img.chunked_loss import read_out_losses
from mutor_img.transformer import Run, Transformer


@dataclass
class Batch:
    """What the network reads of some sequences, and what it is to predict.

    Attributes:
        labels: (B,) int64, the null class where it is dropped.
        codes: (B, N - 1) int64, the inputs x_1 .. x_{N-1}; of patches (B, P - 1, p * p), the codes of each.
        targets: (B, N) int64, x_1 .. x_N; of patches (B, P, p * p).
        anchors, offsets: (B, R) int64 of registers, or None.
        side: p, of the patches that the sequence is of; 1: it is of codes.
        teacher: by the number of blocks passed, the averaged model's residual stream (B, N, dim), for an objective with
            ``teacher_taps``: without gradients, in eval mode, of clean codes and labels that are not dropped.
    """

    labels: Tensor
    codes: Tensor
    targets: Tensor
    anchors: Tensor | None = None
    offsets: Tensor | None = None
    side: int = 1
    teacher: dict[int, Tensor] | None = None


class Objective(nn.Module):
    """What a run trains for. This one is next-token prediction; another overrides what it does otherwise.

    For each update a run asks, in this order, for :meth:`prepare` (what to read and to predict), :meth:`forward` (sums
    of losses, by name), :meth:`terms` (how many losses each sum is of, over the whole global batch) and
    :meth:`weights`. It trains on the weighted sum of the means, and logs each mean.

    An objective hangs on the model as ``model.objective``: what it holds is trained, averaged and checkpointed with the
    model, under names that begin with ``objective.``, and dropped by whoever samples. Draws are functions of (seed,
    step, sample); shapes change from stage to stage at most; nothing waits for the device.

    Attributes:
        config: the model's sizes.
        code_dim: how many numbers each of the tokenizer's vectors of the codes has, where the objective reads these;
            the run hands them to :meth:`take_codebook`. None: it does not.
        read_out: what makes losses of a residual stream, :func:`~mutor_img.chunked_loss.read_out_losses`; training on
            GPUs replaces it by a compiled one.
        teacher_taps: after which blocks the averaged model's states are wanted; () where no such model is needed.
        read_outs: how often N rows of logits are made beside those of the next tokens and of registers, for the plan
            of memory.
        kept_numbers: how many numbers per input stay for the backward pass of what is neither a block nor a read-out,
            for the plan of memory.
    """

    code_dim: int | None = None
    read_out = staticmethod(read_out_losses)
    teacher_taps: tuple[int, ...] = ()
    read_outs = 0
    kept_numbers = 0

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    def take_codebook(self, vectors: Tensor) -> None:
        """Keep the tokenizer's vectors of the codes, (V, code_dim), as ``codebook``: fp32, frozen, never saved."""
        self.register_buffer("codebook", vectors.detach().float(), persistent=False)

    def prepare(self, seed: int, step: int, samples: Tensor, labels: Tensor, codes: Tensor) -> Batch:
        """Return what the network reads and predicts; it may add registers to the sequences, or corrupt the inputs.

        Args:
            seed: the run's.
            step: number of the update.
            samples: (B,) int64 global sample numbers. Here everything is on the CPU, also in a run on a GPU: it draws
                while the GPU works on the update before.
            labels: (B,) int64, the null class where it is dropped.
            codes: (B, N) int64, x_1 .. x_N.
        """
        return Batch(labels, codes[:, :-1], codes)

    def forward(self, model: Transformer, batch: Batch, rows: int = 0) -> dict[str, Tensor]:
        """Return losses by name, each summed over its terms: fp32 scalars. Called within the model's forward pass.

        Args:
            model: the model that this hangs on, all its weights whole: :meth:`~Transformer.run` is its trunk.
            batch: what :meth:`prepare` made.
            rows: the most rows of logits at a time; 0: all.
        """
        run = model.run(batch.labels, batch.codes)
        return {"next_token": self.next_token(model, run, batch, rows)}

    def next_token(self, model: Transformer, run: Run, batch: Batch, rows: int) -> Tensor:
        """Return the loss of a run without registers, whose rows predict what follows: a sum over B N terms."""
        [loss] = self.read_out(run.states[self.config.layers], model.norm, model.output, [batch.targets], rows)
        return loss

    def terms(self, seed: int, step: int, samples: Tensor) -> dict[str, int]:
        """Return how many terms each sum of :meth:`forward` has, from shapes and draws alone.

        Args:
            seed, step: as for :meth:`prepare`.
            samples: (global batch,) int64, all samples of the update, on the CPU.
        """
        return {"next_token": len(samples) * self.config.length}

    def weights(self, step: int, steps: int) -> dict[str, float]:
        """Return what each mean is multiplied by at update ``step`` of ``steps``."""
        return {"next_token": 1.0}

    def blocks(self) -> list[nn.Module]:
        """Return the heavy parts of this: like the model's blocks, compiled, checkpointed and sharded one by one.

        :attr:`Run.keys <mutor_img.transformer.Run>` has keys for the dropout of each, in this order.
        """
        return []

    def extra_flops(self, step: int) -> tuple[float, float]:
        """Return the forward FLOPs per sequence of update ``step`` beside those of a model that reads N inputs.

        First those of what is trained, which goes backward too (below 0 where fewer inputs are read), then those of
        what is frozen.
        """
        return 0.0, 0.0

    def extra_parameters(self) -> int:
        """Return how many numbers are trained that sampling does not use."""
        return sum(p.numel() for p in self.parameters())
