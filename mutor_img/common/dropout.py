"""Dropout whose masks are functions of keys, computed in the kernel that uses them.

Nothing is drawn, kept or restored: the same keys give the same mask in the backward pass, when activations are
computed again, after a resume, and on any number of processes. Keys are 64 random bits for each sequence of a batch and
each place in the network; within a sequence the mask is a hash of the number's position and channel: "lowbias32" (Chris
Wellons, 2018; two multiplications between shifts), in 32-bit integers, which wrap alike on CPUs and GPUs, compiled or
not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mutor_img.common.streams import Stream, bits

_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B - 2**32  # as a signed 32-bit integer


def mask_keys(seed: int, step: int, samples: Tensor, places: int) -> Tensor:
    """Return the keys of a batch's masks, (places, B, 2) int32, on the device of ``samples``.

    Args:
        seed: the run's.
        step: number of the update.
        samples: (B,) int64 global sample numbers.
        places: in how many places of the network something is dropped.
    """
    place = torch.arange(places, device=samples.device)[:, None]
    return bits(seed, Stream.DROPOUT, step, samples, place)[..., None].view(torch.int32)


def row_keys(keys: Tensor, rows: int, width: int) -> Tensor:
    """Return the keys of each position, (.., rows, 2) int32: so kernels need not tell position from sequence.

    Args:
        keys: (.., 2) int32, of sequences of ``rows`` positions.
        width: numbers per position; ``rows * width`` is at most 2**32.
    """
    first = torch.arange(rows, dtype=torch.int32, device=keys.device) * width
    return keys[..., None, :] + torch.stack([first, torch.zeros_like(first)], dim=-1)


def kept(keys: Tensor, width: int, rate: float) -> Tensor:
    """Return what is not dropped, (.., width) bool.

    Args:
        keys: (.., 2) int32, of :func:`row_keys`.
        width: numbers per position.
        rate: the share that is dropped, in [0, 1).
    """
    first, second = keys[..., None, :].unbind(-1)  # (.., 1)
    x = torch.arange(width, dtype=torch.int32, device=keys.device) + first
    x ^= x >> 16  # in place: uncompiled, memory that is new costs more than what is computed
    x *= _MIX_1
    x ^= second
    x ^= x >> 15
    x *= _MIX_2
    return x >= round(rate * 2**32) - 2**31


def dropout(x: Tensor, keys: Tensor | None, rate: float, whole: bool = False) -> Tensor:
    """Return x with a share of it set to 0, and the rest scaled up so that the mean stays.

    Args:
        x: (B, S, dim).
        keys: (B, S, 2) int32, of :func:`row_keys`; None: nothing is dropped.
        rate: the share, in [0, 1).
        whole: sequences are dropped, not single numbers (stochastic depth).
    """
    if keys is None or not rate:
        return x
    mask = kept(keys[:, :1], 1, rate) if whole else kept(keys, x.shape[-1], rate)
    return torch.where(mask, x * (1 / (1 - rate)), 0.0)
