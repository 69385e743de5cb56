"""Fewer passes of the network, the same codes: a window of drafts that each pass verifies.

Code t of an image is drawn with the random number of (seed, image, t) alone, so it is a function of the codes before
it. One pass therefore runs a window of W inputs per image: the last code that is certain, and drafts of the W - 1 codes
after it. The draw of the first row is the next code. If the first draft equals it, the second row had the right codes
before it, and its draw is certain too; and so on up to the first draft that was wrong. A draft decides how many passes
an image takes, never a code: whatever the drafts are, each pass makes at least one code certain.

The draws behind a wrong draft stay as the drafts of the next pass (coupled Jacobi iteration, as in predictive sampling,
arXiv 2002.09928). Drafts of places that no window has reached yet come from a source:

=============  =======================================================================================
``window``     the last draw of the window, repeated
``frequency``  a draw, with the place's own random number, from the codes that earlier images have there; as
               ``window`` for the first images
``registers``  as ``frequency``, and W - 1 registers after the window's last input; each costs a row
=============  =======================================================================================

The cache needs no repair. A row writes its key and value at its own slot and reads nothing behind it, and the next
window begins where the certain codes end: it writes every slot that a wrong draft has touched before any row reads it.
A register has the slot after the window for itself, and the next window writes that one, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mutor_img.blocks import ModelConfig
from mutor_img.common.errors import UserError, check_choice
from mutor_img.common.streams import Stream, uniform
from mutor_img.decoding.cpu import CHUNK
from mutor_img.decoding.guidance import guide
from mutor_img.registers import embedding_rows
from mutor_img.transformer import Transformer

SOURCES = ("window", "frequency", "registers")
AUTO = "auto"
TRIES = 3  # of each window, until ``auto`` settles for one or for none
LOSS = 0.03  # of the time of a sequential image: what a try may lose until it is given up
REMEMBERED = 256  # images whose codes ``frequency`` draws from, the latest


@dataclass(frozen=True)
class Draft:
    """How codes are drafted: it decides how fast samples come, never which.

    Attributes:
        window: W, the inputs of an image per pass; 0: sequential decoding, one code per pass. ``"auto"``: on CPUs in
            fp32, as many as fill the rows that would be padding, or for a single image twice as many, where drafts
            prove faster (:class:`Trial`); else 0.
        source: one of ``SOURCES``; where the first drafts of a place come from.
    """

    window: int | str = 0
    source: str = "frequency"

    @classmethod
    def parse(cls, window: str, source: str) -> Draft:
        """Read ``--draft`` (a number, ``auto``, or ``off``, which is 0) and ``--draft-source``.

        Raises:
            UserError: neither a number nor one of the words, or an unknown source.
        """
        check_choice("--draft-source", source, SOURCES)
        try:
            draft = cls(AUTO if window == AUTO else 0 if window == "off" else int(window), source)
        except ValueError:
            raise UserError(f"--draft is {window!r}; give the inputs of an image per pass, as in 8, or auto, or "
                            "off") from None
        if draft.window == 0 and source != cls.source:
            raise UserError(f"--draft-source {source} does nothing without drafts; give --draft too, as in --draft 8")
        return draft

    def fit(self, config: ModelConfig) -> Draft:
        """Return what a model can have of it: at most all codes per pass, and windows where it has no registers.

        Raises:
            UserError: a window or a source that there is not.
        """
        check_choice("draft-source", self.source, SOURCES)
        whole = isinstance(self.window, int) and not isinstance(self.window, bool)
        if self.window != AUTO and not (whole and self.window >= 0):
            raise UserError(f"draft is {self.window!r}; give 'auto', 0 for none, or the inputs of an image per pass, "
                            "as in 8")
        window = self.window if self.window == AUTO else min(self.window, config.length)
        without = self.source == "registers" and config.register_offsets is None
        return Draft(window, "window" if without else self.source)

    def rows(self, window: int) -> int:
        """Return S, the rows of an image per pass: its window, and the registers after it."""
        return 2 * window - 1 if self.source == "registers" else window

    @property
    def offsets(self) -> range:
        """The offsets of the registers that this takes at most; offset 1 is the window's own last draw."""
        width = max(self.widths(1)) if self.window == AUTO else self.window
        return range(2, width + 1) if self.source == "registers" else range(0)

    def to_json(self) -> dict[str, int | str]:
        """Return what a manifest says of it."""
        return {"draft": self.window, "draft_source": self.source} if self.window else {"draft": 0}

    def widths(self, images: int) -> list[int]:
        """Return the windows that ``auto`` tries for so many images at a time; none where no rows would be padding."""
        rows = CHUNK // images if images else 0
        most = [rows, 2 * rows] if images == 1 else [rows]
        widths = [(rows + 1) // 2 if self.source == "registers" else rows for rows in most]
        return [width for width in widths if width > 1]


NO_DRAFT = Draft()


class Trial:
    """Which window is fastest here, if any: each is tried on a few batches, and the fastest way goes on.

    What a row costs depends on the model and the machine, and how many passes drafts save depends on the images. A try
    is given up once it has lost ``LOSS`` of the time that sequential decoding takes for the batch, which then goes on
    without drafts: so even a run of one image loses little.
    """

    def __init__(self, widths: Sequence[int], length: int, step: float):
        """Begin.

        Args:
            widths: the windows to try.
            length: N.
            step: seconds of a step of sequential decoding.
        """
        self.length, self.step = length, step
        self.rates = {0: 1 / step}  # the most codes of an image per second by window
        self.left = list(widths) * TRIES

    @property
    def width(self) -> int:
        """The window of the next batch; 0: none."""
        return self.left[0] if self.left else max(self.rates, key=self.rates.__getitem__)

    def loses(self, certain: int, seconds: float) -> bool:
        """Tell whether a try is to be given up that has made so many codes of each image certain by now."""
        return bool(self.left) and seconds > (certain + LOSS * self.length) * self.step

    def note(self, width: int, certain: int, seconds: float) -> None:
        """Take in how long a window has taken for so many codes of each image."""
        self.left = self.left[1:]
        self.rates[width] = max(self.rates.get(width, 0.0), certain / max(seconds, 1e-9))


class WindowDecoder(Protocol):
    """What drafting asks of a decoder."""

    def window(self, x: Tensor, start: Tensor, width: int) -> Tensor:
        """Return logits (Q, S, V) of the rows of a window, of Q sequences in images of Q / B neighbours.

        Args:
            x: (Q, S, dim) embedded inputs: ``width`` regular ones, then registers after the last of them.
            start: (B,) int64, the place of each image's first input; N: the image is finished, and its rows are
                unspecified, as are those past the end of the grid.
            width: W.
        """


class Drafts:
    """The codes of B images, certain ones and drafts, and how far the certain ones go.

    Attributes:
        codes: (B, N + S) int64; of an image, those before its ``start`` are certain and the next ones drafts. The
            places past the grid are padding.
        start: (B,) int64, the certain codes of each image, up to N; the window begins with the last of them.
        passes: (B,) int64, the passes that each image has taken.
    """

    def __init__(self, guesses: Tensor, rows: int, width: int, repeat: bool, kept: Tensor):
        """Begin with no certain code.

        Args:
            guesses: (B, N) int64, the first drafts.
            rows: S, the rows of an image per pass.
            width: W, those of them that are regular inputs.
            repeat: places behind a window take its last draw, not their guess.
            kept: (N,) int64, codes that no draw decides; -1: one does.
        """
        self.length, self.width, self.repeat = guesses.shape[1], width, repeat
        self.kept = F.pad(kept, (0, rows), value=-1)  # (N + S,)
        self.codes = self._keep(F.pad(guesses, (0, rows)), self.kept)
        self.start = torch.zeros(len(guesses), dtype=torch.int64, device=guesses.device)
        self.passes = torch.zeros_like(self.start)
        self.window = torch.arange(rows, device=guesses.device)
        self.all_places = torch.arange(self.codes.shape[1], device=guesses.device)

    @property
    def places(self) -> Tensor:
        """The places (B, S) whose codes a pass draws; those of registers follow those of the window."""
        return self.start[:, None] + self.window

    def inputs(self, places: Tensor) -> Tensor:
        """Return the codes (B, W) before :attr:`places`; that of place 0, which has none, is unspecified."""
        return self.codes.gather(1, (places[:, : self.width] - 1).clamp(min=0))

    @property
    def certain(self) -> int:
        """How many codes of each image are certain at least."""
        return int(self.start.min())

    @property
    def finished(self) -> bool:
        """Whether all codes of all images are certain."""
        return self.certain == self.length

    def take(self, places: Tensor, drawn: Tensor) -> None:
        """Go on with what a pass has drawn, (B, S) int64 at :attr:`places`."""
        drawn = self._keep(drawn, self.kept[places])
        # A row's draw is certain if the drafts of all places before its own were right.
        right = (self.codes.gather(1, places) == drawn)[:, : self.width - 1]  # (B, W - 1)
        certain = 1 + right.cumprod(1).sum(1)
        if self.repeat:
            last = slice(self.width - 1, self.width)
            behind = torch.where(self.all_places > places[:, last], drawn[:, last], self.codes)  # (B, N + S)
            self.codes = self._keep(behind, self.kept)
        self.codes.scatter_(1, places, drawn)
        self.passes += self.start < self.length
        self.start = (self.start + certain).clamp(max=self.length)

    @staticmethod
    def _keep(codes: Tensor, kept: Tensor) -> Tensor:
        return torch.where(kept < 0, codes, kept)


class Drafter:
    """Samples codes with drafts, a few images at a time.

    Attributes:
        passes: of each image of the last call, (B,) int64.
        certain: the codes of each image that the last call has made certain: N, or fewer if it was given up.
    """

    def __init__(self, model: Transformer, draft: Draft, scales: Sequence[float], seed: int,
                 draw: Callable[[Tensor, Tensor], Tensor], beginnings: Tensor, kept: Tensor):
        """Prepare.

        Args:
            model: the transformer.
            draft: how codes are drafted, as :meth:`Draft.fit` has it for the model.
            scales: the guidance scale of each of the N codes.
            seed: the random streams'.
            draw: from logits (R, V) and numbers (R,) to codes (R,), -1 where logits are not finite.
            beginnings: (classes + 1, dim), the first input of a sequence by its class.
            kept: (N,) int64, codes that no draw decides; -1: one does.
        """
        self.model, self.draft, self.seed, self.draw = model, draft, seed, draw
        self.beginnings, self.kept = beginnings, kept
        self.scales = torch.tensor(scales, dtype=torch.float32, device=model.output.weight.device)  # (N,)
        self.halves = 2 if max(scales) > 1 else 1
        self.certain = 0
        self.latest = torch.empty(0, len(scales), dtype=torch.int64, device=self.scales.device)  # codes of images
        self.seen: Tensor | None = None  # (up to REMEMBERED, N), the same, ascending at each place; None: no image yet

    def generate(self, decoder: WindowDecoder, labels: Tensor, samples: Tensor, count: int, width: int,
                 loses: Callable[[int], bool] | None = None) -> Tensor:
        """Return codes (B, N) for labels and sample numbers (B,) int64; -1 where logits are not finite.

        Codes from :attr:`certain` on, if it was given up, are drafts.

        Args:
            decoder: for ``count * halves`` sequences.
            count: images at a time; the last ones are padded with finished images.
            width: W.
            loses: told after each pass how many codes of each image are certain, whether to give up; only for up to
                ``count`` images.
        """
        codes, passes = [], []
        for some, numbers in zip(labels.split(count), samples.split(count)):
            drafts = self._run(decoder, F.pad(some, (0, count - len(some))), F.pad(numbers, (0, count - len(some))),
                               len(some), width, loses)
            codes.append(drafts.codes[: len(some), : drafts.length])
            passes.append(drafts.passes[: len(some)])
            self.certain = drafts.certain
            if self.certain == drafts.length:
                self._remember(codes[-1])
        self.passes = torch.cat(passes)
        return torch.cat(codes)

    def _run(self, decoder: WindowDecoder, labels: Tensor, samples: Tensor, real: int, width: int,
             loses: Callable[[int], bool] | None) -> Drafts:
        """Return the drafts of ``count`` images, the first ``real`` of them sampled to the end, or until it loses."""
        length, rows = len(self.scales), self.draft.rows(width)
        every = torch.arange(length + rows, device=labels.device)
        numbers = uniform(self.seed, Stream.TOKEN, samples[:, None], every)  # (count, N + S)
        scales = F.pad(self.scales, (0, rows), value=1.0)  # (N + S,)
        drafts = Drafts(self._guess(numbers[:, :length]), rows, width, self.seen is None, self.kept)
        drafts.start[real:] = length
        begin, registers = self._rows(labels, rows - width)
        while not drafts.finished:
            places = drafts.places  # (count, S)
            inputs = self._embed(drafts, places, begin, registers)
            logits = decoder.window(inputs, drafts.start, width)  # (Q, S, V)
            logits = self._guide(logits.float().unflatten(0, (len(labels), self.halves)), scales[places])
            drawn = self.draw(logits.flatten(0, 1), numbers.gather(1, places).flatten())
            drafts.take(places, drawn.view_as(places))
            if loses and loses(drafts.certain):
                break
        return drafts

    def _guide(self, logits: Tensor, scales: Tensor) -> Tensor:
        """Return logits (count, S, V) from those of both halves (count, halves, S, V) and scales (count, S)."""
        conditional = logits[:, 0]
        if self.halves == 1:
            return conditional
        guided = guide(logits.transpose(0, 1), scales[..., None])[0]
        return torch.where(scales[..., None] > 1, guided, conditional)

    def _rows(self, labels: Tensor, registers: int) -> tuple[Tensor, Tensor]:
        """Return the inputs that no code decides: the first of both halves (count, halves, dim), registers (R, dim)."""
        model = self.model
        halves = torch.stack([labels, torch.full_like(labels, model.config.classes)][: self.halves], 1)
        offsets = torch.arange(2, registers + 2, device=labels.device)  # offset 1 is the last input's own target
        rows = (model.register_embedding(embedding_rows(offsets, model.config.register_offsets)) if registers
                else model.tok_embeddings.weight[:0])
        return self.beginnings[halves], rows

    def _embed(self, drafts: Drafts, places: Tensor, begin: Tensor, registers: Tensor) -> Tensor:
        """Return the inputs (Q, S, dim) of a pass at places (count, S); see :meth:`_rows`.

        Both halves of an image have the same ones but for the class.
        """
        x = self.model.tok_embeddings(drafts.inputs(places).clamp(min=0))[:, None].repeat(1, self.halves, 1, 1)
        x[:, :, 0] = torch.where((drafts.start == 0)[:, None, None], begin, x[:, :, 0])
        if len(registers):
            x = torch.cat([x, registers.expand(*x.shape[:2], -1, -1)], 2)
        return x.flatten(0, 1)

    def _guess(self, numbers: Tensor) -> Tensor:
        """Return first drafts (count, N) for the places' numbers (count, N) in [0, 1)."""
        if self.seen is None:
            return torch.zeros(numbers.shape, dtype=torch.int64, device=numbers.device)
        return self.seen.gather(0, (numbers * len(self.seen)).long())  # the inverse of the codes' distribution

    def _remember(self, codes: Tensor) -> None:
        if self.draft.source != "window":
            self.latest = torch.cat([self.latest, codes])[-REMEMBERED:]
            self.seen = self.latest.sort(dim=0).values
