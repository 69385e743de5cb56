"""The codebook: nearest code, gradients straight through, and codes that nobody uses brought back.

Latents and codes are l2-normalised before they are compared and before a code is decoded, so that only directions
count; the stored rows need not be unit length (ViT-VQGAN, arXiv 2110.04627, section 3.2; LlamaGen, arXiv 2406.06525).
Other families compare them as they are (VQGAN, arXiv 2012.09841, equation 2): ``unit=False``, not trained here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutor_img.common.errors import UserError
from mutor_img.data.store import MOST_CODES

USED_SLOTS = 65536  # length of the released files' codebook_used
USAGE_TEMPERATURE = 0.01  # of the soft choice in the codebook-usage loss (LlamaGen's)
_SCORES_AT_ONCE = 2**24  # 64 MiB of fp32 scores, whatever the vocabulary


class Quantised(NamedTuple):
    """What the quantiser makes of latents (B, C, h, w)."""

    latents: Tensor  # (B, C, h, w): the chosen codes, with the gradient of the normalised latents
    indices: Tensor  # (B, h*w) int64, raster order
    losses: dict[str, Tensor]  # scalars: "codebook" moves codes to latents, "commitment" latents to codes; "entropy"
    unit: Tensor  # (B, C, h, w) fp32: the latents as compared, normalised unless ``unit=False``, without gradient


class Quantizer(nn.Module):
    """A codebook of ``vocabulary`` codes of ``code_dim`` numbers.

    The buffer ``codebook_used`` has the name that released files give it, and their size unless the vocabulary is
    larger. Here entry k counts the updates since code k was last chosen; in a released file it is a list of recent
    codes, which nothing reads.

    Args:
        vocabulary: number of codes.
        code_dim: numbers per code.
        unit: compare by angle, as unit vectors; else by distance.

    Attributes:
        with_usage_loss: add the loss ``"entropy"``, :func:`usage_loss`, in training; off at first, for it keeps a
            score of every code for every latent.

    Raises:
        UserError: the vocabulary is not in 2 .. ``MOST_CODES``.
    """

    def __init__(self, vocabulary: int, code_dim: int, unit: bool = True):
        super().__init__()
        if not 2 <= vocabulary <= MOST_CODES:
            raise UserError(f"vocabulary is {vocabulary}; give 2 to {MOST_CODES} codes")
        self.vocabulary, self.unit = vocabulary, unit
        self.embedding = nn.Embedding(vocabulary, code_dim)
        self.register_buffer("codebook_used", torch.zeros(max(USED_SLOTS, vocabulary)))
        self.with_usage_loss = False

    def forward(self, latents: Tensor) -> Quantised:
        """Quantise latents (B, C, h, w) of any float dtype; distances and losses are fp32.

        Losses are means over all entries, in van den Oord's form (arXiv 1711.00937, eq. 3) and not yet weighted.
        """
        with without_autocast(latents.device):
            unit = self._compared(latents, 1)  # (B, C, h, w)
            indices = self.nearest(unit)  # (B, h*w)
            chosen = self.lookup(indices, unit.shape[-2:])  # (B, C, h, w)
            losses = {
                "codebook": F.mse_loss(chosen, unit.detach()),
                "commitment": F.mse_loss(unit, chosen.detach()),
            }
            if self.with_usage_loss and self.training:
                losses["entropy"] = usage_loss(unit, self.codes())
            straight = unit + (chosen - unit).detach()
        return Quantised(straight, indices, losses, unit.detach())

    def codes(self) -> Tensor:
        """Return the codes as they are compared and decoded, (vocabulary, code_dim) fp32: unit length if ``unit``."""
        return self._compared(self.embedding.weight, 1)

    @torch.no_grad()
    def nearest(self, unit: Tensor) -> Tensor:
        """Return the nearest code of each latent: (B, C, h, w) as compared -> (B, h*w) int64; the first one of equals.

        Among unit vectors the nearest is the one of largest dot product. Other distances are summed in the order of
        the public networks, which decides between codes that are as near but for rounding. Scores are made a slice of
        positions at a time and are never all in memory.
        """
        rows = unit.flatten(2).transpose(1, 2).reshape(-1, unit.shape[1])  # (B*h*w, C)
        codes = self.codes().t().contiguous()  # (C, vocabulary)
        step = max(1, _SCORES_AT_ONCE // self.vocabulary)
        if self.unit:
            found = [(part @ codes).argmax(dim=1) for part in rows.split(step)]
        else:
            norms = codes.square().sum(dim=0)  # (vocabulary,)
            found = [(part.square().sum(dim=1, keepdim=True) + norms - 2 * (part @ codes)).argmin(dim=1)
                     for part in rows.split(step)]
        return torch.cat(found).view(unit.shape[0], -1)

    def lookup(self, indices: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return codes as they are compared, laid out as an image: (B, h*w) int64 -> (B, C, h, w) fp32."""
        rows = self._compared(self.embedding(indices), 2)  # (B, h*w, C)
        return rows.transpose(1, 2).reshape(len(indices), -1, *grid)

    def _compared(self, vectors: Tensor, dim: int) -> Tensor:
        return F.normalize(vectors.float(), dim=dim) if self.unit else vectors.float()

    @torch.no_grad()
    def note_use(self, counts: Tensor, skipped: Tensor) -> None:
        """Record one update's use of each code.

        Args:
            counts: (vocabulary,), over the whole global batch.
            skipped: () bool, whether the update is skipped: then it does not count.
        """
        idle = self.codebook_used[: self.vocabulary]
        idle.copy_(torch.where(skipped, idle, torch.where(counts > 0, 0.0, idle + 1)))

    def idle(self, updates: int) -> Tensor:
        """Return which codes went unused for at least ``updates`` updates, (vocabulary,) bool.

        A mask and not the codes themselves: for how many there are, the CPU would wait for the GPU.
        """
        return self.codebook_used[: self.vocabulary] >= updates

    @torch.no_grad()
    def reseed(self, moved: Tensor, latents: Tensor) -> None:
        """Move the codes of a mask (vocabulary,) onto unit ``latents`` (vocabulary, C): they count as just used."""
        weight = self.embedding.weight
        weight.copy_(torch.where(moved[:, None], latents.to(weight), weight))
        self.codebook_used[: self.vocabulary].masked_fill_(moved, 0)


def usage_loss(unit: Tensor, codes: Tensor) -> Tensor:
    """Return the entropy of each latent's soft choice of a code, less that of the choices together, in nats.

    Small where every latent is sure of its code and all codes are in equal use: -log(vocabulary) at best. The choice
    is a softmax of minus the squared distance over :data:`USAGE_TEMPERATURE` (MAGVIT-v2, arXiv 2310.05737, section
    3.1; LlamaGen's entropy loss). The second entropy is that of the mean over the latents given.

    Args:
        unit: (B, C, h, w) fp32 unit latents.
        codes: (vocabulary, C) fp32 unit codes. Both get a gradient.
    """
    rows = unit.flatten(2).transpose(1, 2).flatten(0, 1)  # (B*h*w, C)
    logits = rows @ codes.t() * (2 / USAGE_TEMPERATURE)  # |z - e|^2 = 2 - 2 z e between unit vectors
    choice = logits.log_softmax(dim=1)  # (B*h*w, vocabulary)
    mean = choice.exp().mean(dim=0)  # (vocabulary,)
    spread = -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()
    return -(choice.exp() * choice).sum(dim=1).mean() - spread


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context that switches a caller's autocast off, where the device has such a thing."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def count_codes(indices: Tensor, vocabulary: int) -> Tensor:
    """Return how often each code occurs: int64 indices of any shape -> (vocabulary,) int64.

    As torch.bincount, which on a GPU first waits for the largest index.
    """
    flat = indices.flatten()
    return torch.zeros(vocabulary, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def code_use(counts: Tensor) -> dict[str, Tensor]:
    """Return of code counts (vocabulary,) as float64 scalars: the share of codes that occur at all, and perplexity.

    Perplexity is exp of the entropy: the number of codes in equal use that the use amounts to.
    """
    share = counts.double() / counts.sum().clamp(min=1)
    return {"codes_used": (counts > 0).double().mean(),
            "perplexity": torch.exp(-torch.special.xlogy(share, share).sum())}
