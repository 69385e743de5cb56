"""MuToR registers: where they stand, how far they look, what they predict, and the loss.

Source: Gerontopoulos, Gidaris, Komodakis, "Multi-Token Prediction Needs Registers", NeurIPS 2025 (arXiv 2505.10518).
An image is ``x_1 .. x_N`` in raster order on an ``h x w`` grid. The regular inputs are ``[c, x_1, .., x_{N-1}]`` with
index ``t = 0 .. N-1``; input ``t`` predicts ``x_{t+1}`` at position id ``t``. A register with anchor ``t`` and offset
``d`` stands after input ``t``, predicts ``x_{t+d}``, and has the id of the regular input that predicts the same token,
``t + d - 1``. Everything here is vectorised on the device of ``samples``, with fixed shapes and without a host sync.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mutor_img.common.errors import UserError, check_choice, check_range
from mutor_img.common.streams import Stream, bits, integers

IGNORE = -100  # the target of a register that predicts nothing
KINDS = ("none", "1d", "2d", "set")


@dataclass(frozen=True)
class RegisterLaw:
    """The joint law of anchors and offsets (paper section 3 and its image appendix).

    Attributes:
        kind: ``"1d"``: d uniform in 1 .. d_max. ``"2d"``: (d_h, d_w) uniform in {1 .. d_max}^2 without (1, 1), and
            d = (d_h - 1) * w + (d_w - 1). ``"set"``: d uniform over ``chosen``. ``"none"``: no registers.
        grid: rows h and columns w.
        d_max: the largest offset in 1D, per axis in 2D.
        count: registers per sequence at anchors drawn without replacement; None: one after each input (dense).
        every: one register after each ``every``-th input, from t = 0; None: off.
        mixed: one offset per register, i.i.d.; else one offset per sequence.
        wrap: a 2D offset that runs over the right edge goes on in the next row, as the raster formula says; else such
            a register has no target.
        chosen: the offsets of kind ``"set"``, in any order: leaps over near tokens, or near ones alone.

    Raises:
        UserError: on construction, for a law that cannot be drawn; the largest possible count is named.
    """

    kind: str
    grid: tuple[int, int]
    d_max: int = 4
    count: int | None = None
    every: int | None = None
    mixed: bool = False
    wrap: bool = True
    chosen: tuple[int, ...] = ()

    def __post_init__(self):
        check_choice("registers.kind", self.kind, KINDS)
        rows, columns = self.grid
        if rows < 1 or columns < 1:
            raise UserError(f"grid {rows} x {columns}: both sides must be at least 1")
        if self.kind == "none":
            return
        self._check_offsets()
        if not self.wrap and self.kind != "2d":
            raise UserError("registers.wrap=false drops 2D targets at the right edge; it needs registers.kind=2d")
        if self.count is not None and self.every is not None:
            raise UserError("registers.count and registers.every exclude each other; set one of them to null")
        if self.every is not None and not 1 <= self.every <= self.length:
            raise UserError(f"registers.every is {self.every}; it must be between 1 and {self.length}")
        if self.count is not None and not 1 <= self.count <= self.largest_count:
            reach = f"offsets {list(self.chosen)}" if self.kind == "set" else f"d_max {self.d_max} ({self.kind})"
            raise UserError(f"registers.count is {self.count}; with {reach} on a "
                            f"grid of {rows} x {columns} it must be between 1 and {self.largest_count}, so that every "
                            "register has a target (null: one register after each input)")

    def _check_offsets(self) -> None:
        rows, columns = self.grid
        if self.chosen and self.kind != "set":
            raise UserError(f"registers.offsets are for registers.kind=set, not for {self.kind}; leave them out")
        if self.kind == "set":
            check_offsets("registers.offsets", self.chosen, self.length)
            return
        low, high = (2, min(rows, columns)) if self.kind == "2d" else (1, self.length)
        if not low <= self.d_max <= high:
            raise UserError(f"registers.d_max is {self.d_max}; for kind {self.kind} on a grid of {rows} x {columns} "
                            f"it must be between {low} and {high}")

    @property
    def length(self) -> int:
        """N, the regular inputs of a sequence."""
        return self.grid[0] * self.grid[1]

    @property
    def farthest(self) -> int:
        """d_far, the largest offset in raster order."""
        return self.offsets[-1]

    @property
    def largest_count(self) -> int:
        """The most anchors that have a target whatever offset is drawn."""
        if self.wrap:
            return self.length - self.farthest + 1
        rows, columns = self.grid
        return (rows - self.d_max + 1) * (columns - self.d_max + 1)

    @property
    def registers(self) -> int:
        """R, the registers of a sequence, with or without a target."""
        if self.kind == "none":
            return 0
        if self.every is not None:
            return -(-self.length // self.every)
        return self.length if self.count is None else self.count

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Every possible offset d, ascending: d_max of them in 1D, d_max^2 - 1 in 2D, in a set those chosen."""
        if self.kind == "none":
            return ()
        if self.kind == "set":
            return tuple(sorted(self.chosen))  # the order in which they are written changes no draw
        if self.kind == "1d":
            return tuple(range(1, self.d_max + 1))
        return tuple(down * self.grid[1] + right for down in range(self.d_max) for right in range(self.d_max)
                     if down or right)

    def draw(self, seed: int, step: int, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Draw registers for sequences, as a function of (seed, step, sample number) alone.

        Args:
            seed: the run's seed.
            step: number of the update.
            samples: (B,) int64 global sample numbers; their device is where everything is drawn.

        Returns:
            anchors and offsets, (B, R) int64 each, no two elements of which share memory. A register whose target is
            dropped at the right edge has the offset N + 1, past the end from any anchor.

        Raises:
            UserError: the kind is ``"none"``, which has nothing to draw.
        """
        if self.kind == "none":
            raise UserError("registers.kind is 'none': there are no registers to draw; call the model without them")
        device, count = samples.device, self.registers
        table = _offset_table(self.offsets, device)  # (K,)
        keys = (step, samples[:, None])  # broadcast to (B, 1), or with one key per register to (B, R)
        if self.mixed:
            keys = (*keys, torch.arange(count, device=device))
        offsets = table[integers(len(self.offsets), seed, Stream.OFFSET, *keys)]  # (B, 1) or (B, R)
        if self.count is None:
            anchors = torch.arange(0, self.length, self.every or 1, device=device).repeat(len(samples), 1)
        else:
            anchors = self._draw_anchors(seed, step, samples, offsets)  # (B, R)
        offsets = offsets.expand(len(samples), count).contiguous()
        if not self.wrap:
            offsets = torch.where(self.runs_over(anchors, offsets), self.length + 1, offsets)
        return anchors, offsets

    def _draw_anchors(self, seed: int, step: int, samples: Tensor, offsets: Tensor) -> Tensor:
        """Return (B, R) anchors without replacement, ascending, among those with a target.

        Every place gets a random rank and the R lowest stand, which is a uniform subset.
        """
        places = torch.arange(self.length, device=samples.device)  # (N,)
        # With one offset per register, anchors must fit the farthest: else the two draws would not be independent.
        reach = torch.full_like(samples[:, None], self.farthest) if self.mixed else offsets  # (B, 1)
        fits = places + reach <= self.length  # (B, N)
        if not self.wrap:
            fits &= ~self.runs_over(places, reach)
        ranks = bits(seed, Stream.ANCHOR, step, samples[:, None], places) >> 1  # (B, N), below 2**62
        ranks = torch.where(fits, ranks, torch.iinfo(torch.int64).max)
        chosen = ranks.topk(self.registers, dim=1, largest=False, sorted=False).indices  # (B, R)
        return chosen.sort(dim=1).values

    def runs_over(self, anchors: Tensor, offsets: Tensor) -> Tensor:
        """Tell where a 2D target lies past the right edge; anchor 0 has no cell and never runs over."""
        columns = self.grid[1]
        return (anchors >= 1) & ((anchors - 1) % columns + offsets % columns >= columns)


def check_offsets(name: str, offsets: Sequence[int], highest: int, lowest: int = 1) -> None:
    """Raise :class:`UserError` unless ``offsets`` are at least one, all different, each in lowest .. highest.

    Args:
        name: the key of the config that holds them.
        offsets: raster offsets d.
        highest: N where t + d must reach a code from input 0.
        lowest: 0 where an input may stand for itself.
    """
    if not offsets or len(set(offsets)) < len(offsets) or not all(lowest <= d <= highest for d in offsets):
        raise UserError(f"{name} is {list(offsets)}; give different offsets between {lowest} and {highest}, as in "
                        "[2, 3]")


@lru_cache(maxsize=16)
def _offset_table(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the (K,) offsets on the device; copied there once, since each copy would wait for the device."""
    return torch.tensor(offsets, device=device)


def draw_registers(kind: str, count: int | None, d_max: int, grid: tuple[int, int], seed: int, step: int,
                   samples: Tensor, *, every: int | None = None, mixed: bool = False, wrap: bool = True,
                   offsets: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Draw anchors and offsets for sequences; see :class:`RegisterLaw` for the law and :meth:`RegisterLaw.draw`.

    Args:
        kind: ``"1d"``, ``"2d"`` or ``"set"``.
        count: registers per sequence, None for one after each input.
        d_max: the largest offset, per axis in 2D.
        grid: rows and columns of the code grid.
        seed, step: keys of the draw.
        samples: (B,) int64 global sample numbers.
        every, mixed, wrap: the method's switches.
        offsets: those of kind ``"set"``.

    Returns:
        anchors, offsets: (B, R) int64 each.
    """
    law = RegisterLaw(kind, tuple(grid), d_max, count, every, mixed, wrap, tuple(offsets))
    return law.draw(seed, step, torch.as_tensor(samples, dtype=torch.int64))


def register_ids(anchors: Tensor, offsets: Tensor, length: int) -> Tensor:
    """Return position ids ``t + d - 1``, (B, R) int64, in 0 .. N-1; a register without a target has id N-1."""
    return (anchors + offsets - 1).clamp(max=length - 1)


def embedding_rows(offsets: Tensor, known: tuple[int, ...]) -> Tensor:
    """Return the row of ``register_embedding`` of each offset, int64 of the same shape: 0 where all share one vector.

    Offsets stand in ascending order, so that a row is how many are smaller; an offset past the end (a dropped target)
    takes the last row, and its loss is ignored.

    Args:
        offsets: int64, any shape.
        known: the offsets that have a row each; (): one for all.
    """
    return sum(((offsets > d).to(torch.int64) for d in known[:-1]), torch.zeros_like(offsets))


def register_targets(targets: Tensor, anchors: Tensor, offsets: Tensor) -> Tensor:
    """Return what each register predicts, ``x_{t+d}``, or ``IGNORE`` where t + d > N.

    Args:
        targets: (B, N) int64 codes x_1 .. x_N.
        anchors, offsets: (B, R) int64.

    Returns:
        (B, R) int64.
    """
    length = targets.shape[1]
    places = anchors + offsets - 1  # (B, R), the column of x_{t+d} in targets
    found = targets.gather(1, places.clamp(max=length - 1))  # (B, R)
    return torch.where(places < length, found, IGNORE)


def count_targets(anchors: Tensor, offsets: Tensor, length: int) -> Tensor:
    """Return how many registers have a target, a scalar int64 tensor on their device."""
    return (anchors + offsets <= length).sum()


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy in fp32 over targets that are not ``IGNORE``.

    Args:
        logits: (B, S, V), any float dtype.
        targets: (B, S) int64, or (B, S, K): K targets of each row, which count alike.
    """
    if targets.dim() == logits.dim():
        kept = targets != IGNORE
        found = logits.float().log_softmax(dim=-1).gather(-1, targets.where(kept, 0))  # (B, S, K)
        return -found.where(kept, 0.0).sum()
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def mutor_loss(logits: Tensor, register_logits: Tensor | None, targets: Tensor, anchors: Tensor | None = None,
               offsets: Tensor | None = None, weight: float = 0.5) -> Tensor:
    """Return ``(1 - weight) * L_ntp + weight * L_reg`` of one batch, both means over the batch (paper eq. 5).

    Args:
        logits: (B, N, V) of the regular inputs.
        register_logits: (B, R, V), or None for next-token prediction alone, which then has the full weight.
        targets: (B, N) int64 codes x_1 .. x_N.
        anchors, offsets: (B, R) int64.
        weight: the registers' share a in [0, 1].

    Returns:
        A scalar fp32 tensor.

    Raises:
        UserError: a weight outside [0, 1].
    """
    check_range("weight", weight, 0.0, 1.0)
    next_token = cross_entropy_sum(logits, targets) / targets.numel()
    if register_logits is None:
        return next_token
    register_sum = cross_entropy_sum(register_logits, register_targets(targets, anchors, offsets))
    count = count_targets(anchors, offsets, targets.shape[1]).clamp(min=1)
    return (1 - weight) * next_token + weight * register_sum / count
