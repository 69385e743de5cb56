"""Sampling codes from the transformer: guidance, filtering, and one stateless random number per token.

Row j of a batch is a function of (seed, first + j), the label, the settings and the weights, and of nothing else.
On CPUs in fp32 that holds to the last bit: the network always runs on whole chunks of ``CHUNK`` sequences, and sample i
stands in row i mod CHUNK of its own, whoever its neighbours are. Chunks run together only where that changes no bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mutor_img.blocks import ModelConfig
from mutor_img.common.errors import UserError, check_range
from mutor_img.common.streams import Stream, uniform
from mutor_img.decoding.cpu import CHUNK, PackedDecoder, PackedTransformer, PrefixCache, pack
from mutor_img.decoding.drafting import AUTO, NO_DRAFT, Draft, Drafter, Trial
from mutor_img.decoding.gpu import MOST_ROWS, StaticDecoder, static_decoder
from mutor_img.decoding.guidance import guidance_scales, guide
from mutor_img.transformer import Transformer


@dataclass(frozen=True)
class SamplingSettings:
    """What decides the codes of a sample beside its number, its label and the weights.

    Attributes:
        cfg_scale: guidance scale >= 1; 1: none.
        cfg_schedule, cfg_parameter: see :func:`~mutor_img.decoding.guidance.guidance_scales`.
        temperature: > 0; divides the logits after guidance.
        top_k: the k most likely codes only; 0: all.
        top_p: after top_k, the smallest set of codes whose mass is at least this; 1: all.
        seed: the random streams'.
        mix_with, mix_share: a class that every label is mixed with, and its share in [0, 1] of the class embedding;
            None: each label is itself.
        kept: (N) the codes that every image has already, -1 where one is sampled; None: all are sampled.
    """

    cfg_scale: float = 2.0
    cfg_schedule: str = "constant"
    cfg_parameter: float | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    mix_with: int | None = None
    mix_share: float | None = None
    kept: tuple[int, ...] | None = None

    def validate(self, config: ModelConfig) -> None:
        """Raise :class:`UserError` for a value that is out of range for a model."""
        check_range("cfg_scale", self.cfg_scale, 1.0, 1e6)
        check_range("temperature", self.temperature, 0.0, 1e6, low_open=True)
        check_range("top_k", self.top_k, 0, config.vocabulary)
        check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        guidance_scales(self.cfg_schedule, self.cfg_scale, self.cfg_parameter, 1)
        if (self.mix_with is None) != (self.mix_share is None):
            raise UserError("mix_with and mix_share do nothing without each other; give a class and its share")
        if self.mix_with is not None:
            check_range("mix_with", self.mix_with, 0, config.classes - 1)
            check_range("mix_share", self.mix_share, 0.0, 1.0)
        if self.kept is not None:
            if len(self.kept) != config.length or -1 not in self.kept:
                raise UserError(f"kept holds {len(self.kept)} codes, {self.kept.count(-1)} of them -1; give the "
                                f"model's {config.length}, with -1 for each that is to be sampled")
            check_range("the largest code of kept", max(self.kept), -1, config.vocabulary - 1)
            check_range("the smallest code of kept", min(self.kept), -1, -1)

    def to_json(self) -> dict[str, Any]:
        """Return all of them as JSON values."""
        return {**asdict(self), "kept": None if self.kept is None else list(self.kept)}


def generate(model: Transformer, labels: Tensor | Sequence[int], cfg_scale: float = 2.0, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, seed: int = 0, first: int = 0, draft: int | str = 0,
             draft_source: str = Draft.source) -> Tensor:
    """Sample the codes of one image a label.

    Args:
        model: the transformer, in any mode (dropout is never applied here) and on any device.
        labels: (B,) in 0 .. classes - 1.
        cfg_scale, temperature, top_k, top_p, seed: see :class:`SamplingSettings`.
        first: number of the first sample; row j uses the random stream f(seed, first + j).
        draft, draft_source: how many codes a pass of the network drafts, and where from; they decide how fast the
            codes come, never which. See :class:`~mutor_img.decoding.drafting.Draft`.

    Returns:
        (B, N) int64 codes on the model's device.

    Raises:
        UserError: a value or a label out of range, or weights that give logits which are not finite.
    """
    labels = torch.as_tensor(labels, dtype=torch.int64)
    settings = SamplingSettings(cfg_scale, "constant", None, temperature, top_k, top_p, seed)
    return generate_samples(model, labels, first + torch.arange(len(labels)), settings, Draft(draft, draft_source))


def generate_samples(model: Transformer, labels: Tensor, samples: Tensor, settings: SamplingSettings,
                     draft: Draft = NO_DRAFT) -> Tensor:
    """Sample the codes of the given samples; as :func:`generate` for sample numbers that need not be consecutive.

    Args:
        labels: (B,) int64.
        samples: (B,) int64 sample numbers, all different.

    Returns:
        (B, N) int64 codes.
    """
    return Sampler(model, settings, max(1, len(labels)), draft=draft).generate(labels, samples)


class Sampler:
    """A model's weights made ready for sampling, and one cache for all batches. Make a new one after an update.

    What is costly to prepare (weights laid out for a CPU, a step compiled for a GPU) is kept beside the model, and
    serves the next sampler too where neither weights nor shapes have changed.

    Attributes:
        count: images that are made at a time, or fewer on CPUs in fp32; batches are cut and padded to it. With guidance
            the network runs on twice as many sequences.
    """

    def __init__(self, model: Transformer, settings: SamplingSettings, batch: int, keep: bool = True,
                 draft: Draft = NO_DRAFT):
        """Prepare.

        Args:
            model: the transformer.
            settings: what decides the samples.
            batch: images at a time where the number is free, that is anywhere but on CPUs in fp32; on GPUs at most
                ``MOST_ROWS``, with guidance half of it.
            keep: False: nothing is compiled or kept beside the model; amid training.
            draft: how codes are drafted.

        Raises:
            UserError: settings out of range, or a draft that cannot be.
        """
        config, weight = model.config, model.output.weight
        settings.validate(config)
        self.model, self.config, self.settings, self.device = model, config, settings, weight.device
        self.static = _replays(weight.device)
        self.fixed = not self.static and weight.dtype == torch.float32
        self.scales = guidance_scales(settings.cfg_schedule, settings.cfg_scale, settings.cfg_parameter, config.length)
        # After the last guided token, or without any, there is no second half of the batch.
        self.guided_until = max((token + 1 for token, scale in enumerate(self.scales) if scale > 1), default=0)
        self.halves = 2 if self.guided_until else 1
        self.keep, self.draft = keep, draft.fit(config)
        self.beginnings = class_inputs(model, settings)
        kept = settings.kept or [-1] * config.length
        self.kept = torch.tensor(kept, device=self.device)  # (N,)
        self.drawn = [code < 0 for code in kept]  # by place; known here, so that no step waits for a device
        self.end = config.length - self.drawn[::-1].index(True)  # behind the last place that is drawn
        self.drafter = Drafter(model, self.draft, self.scales, settings.seed, partial(draw, settings=settings),
                               self.beginnings, self.kept)
        self.trials: dict[int, Trial] = {}  # of ``auto``, by the number of images at a time
        with torch.no_grad():
            self.packed = None if self.static else pack(model) if keep else PackedTransformer(model)
            self.count = self._count(batch)
        self.decoders: dict[int, PackedDecoder | StaticDecoder] = {}  # by W, 0: of single steps; those asked for so far

    def _count(self, batch: int) -> int:
        if self.static:
            return min(batch, MOST_ROWS // self.halves)
        return min(-(-batch // CHUNK) * CHUNK, self.packed.most_together(self.halves)) if self.fixed else batch

    def _may_run_together(self, images: int) -> bool:
        """Tell whether a pass over so many images, a multiple of ``CHUNK``, gives the bits of a chunk of them alone."""
        return images == CHUNK or all(self.packed.rows_are_independent(half * count)
                                      for half in {1, self.halves} for count in (CHUNK, images))

    def decoder(self, window: int = 0) -> PackedDecoder | StaticDecoder:
        """Return the decoder of passes over a window W of each image; 0: of single steps."""
        if window not in self.decoders:
            rows = self.halves * self.images(window)
            inputs = (window, self.draft.rows(window) - window) if window else None  # regular ones, and registers
            with torch.no_grad():
                self.decoders[window] = (static_decoder(self.model, rows, inputs, eager=not self.keep) if self.static
                                         else PackedDecoder(self.packed, rows))
        return self.decoders[window]

    def images(self, window: int) -> int:
        """Return how many images run at a time with a window W; 0: without one.

        On CPUs in fp32 these are as many images as fit, with their windows, into the rows of one chunk.
        """
        return max(1, CHUNK // self.draft.rows(window)) if self.fixed and window else self.count

    def generate(self, labels: Tensor, samples: Tensor) -> Tensor:
        """Return codes (B, N) int64 on the model's device for labels and sample numbers (B,) int64, any B.

        Raises:
            UserError: a label out of range, or logits that are not finite.
        """
        if labels.dim() != 1 or labels.shape != samples.shape:
            raise ValueError(f"labels {tuple(labels.shape)} and samples {tuple(samples.shape)} must both be (B,)")
        wrong = labels[(labels < 0) | (labels >= self.config.classes)]
        if len(wrong):
            raise UserError(f"label {int(wrong[0])} is out of range; the model has classes 0 to "
                            f"{self.config.classes - 1}")
        labels, samples = labels.to(self.device), samples.to(self.device)
        window = self._window(len(labels))
        decoder = self.decoder(window)  # not in inference mode: its cache serves other decoders after it
        with _evaluating(self.model), torch.no_grad() if self.static else torch.inference_mode():
            if not window:
                made = self._in_turn(decoder, labels, samples)
            elif self.draft.window == AUTO:
                made = self._tried(window, labels, samples)
            else:
                made = self.drafter.generate(decoder, labels, samples, self.images(window), window)
        codes = torch.empty_like(made).copy_(made)  # no inference tensor
        if len(codes) and int(codes.min()) < 0:
            raise UserError("the model's logits are not finite; its weights are damaged, or too large for their dtype")
        return codes

    def _window(self, images: int) -> int:
        """Return W for so many images at a time; 0: no drafts."""
        if self.draft.window != AUTO:
            return self.draft.window if images and self._keeps_bits(self.draft.window) else 0
        widths = [w for w in self.draft.widths(images) if self._keeps_bits(w)] if self.fixed else []
        if widths and images not in self.trials:
            self.trials[images] = Trial(widths, self.config.length, self._step_seconds())
        return self.trials[images].width if widths else 0

    def _keeps_bits(self, window: int) -> bool:
        """Tell whether passes over a window W give the bits of single steps, as far as that is promised."""
        if not self.fixed or not window:
            return True
        rows = self.halves * self.images(window) * self.draft.rows(window)
        return all(self.packed.rows_are_independent(count) for count in (self.halves * CHUNK, rows))

    def _step_seconds(self) -> float:
        """Return how long a step of sequential decoding takes, half-way through an image: the second of two."""
        decoder, middle = self.decoder(), self.config.length // 2
        codes = torch.zeros(CHUNK, dtype=torch.int64)  # there are no more images than that where drafts are tried
        with torch.inference_mode():
            for _ in range(2):
                begun = time.perf_counter()
                self._draw(self._decode(decoder, codes, middle), codes.double(), middle)
                seconds = time.perf_counter() - begun
        return max(seconds, 1e-9)  # a coarse clock may say 0

    def _tried(self, window: int, labels: Tensor, samples: Tensor) -> Tensor:
        """Return codes (B, N), with drafts as long as ``auto`` has it so, and the rest one after the other."""
        trial, begun = self.trials[len(labels)], time.perf_counter()
        codes = self.drafter.generate(self.decoder(window), labels, samples, self.images(window), window,
                                      lambda certain: trial.loses(certain, time.perf_counter() - begun))
        certain = self.drafter.certain
        trial.note(window, certain, time.perf_counter() - begun)
        if certain == codes.shape[1]:
            return codes
        return self._in_turn(self.decoder(), labels, samples, codes[:, :certain], self.decoder(window).cache)

    def _in_turn(self, decoder: PackedDecoder | StaticDecoder, labels: Tensor, samples: Tensor,
                 known: Tensor | None = None, cache: PrefixCache | None = None) -> Tensor:
        """Return codes (B, N), one after the other.

        Args:
            known: (B, M), the codes so far; none: from the start.
            cache: the decoder's that has made them, with the sequences of an image side by side.
        """
        codes = torch.zeros(len(labels), self.config.length, dtype=torch.int64, device=self.device)
        for rows, slots, count in self._passes(samples):
            padded = torch.zeros(2, count, dtype=torch.int64, device=self.device)
            padded[:, slots] = torch.stack([labels[rows], samples[rows]])
            begun = torch.zeros(count, 0 if known is None else known.shape[1], dtype=torch.int64, device=self.device)
            if known is not None:
                begun[slots] = known[rows]
                decoder.cache.take(cache, rows, slots, self.halves, count, known.shape[1])
            codes[rows] = self._run(decoder, *padded, begun)[slots]
        return codes

    def _passes(self, samples: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield the rows of the batch that run together, their slots (rows,), and how many slots there are."""
        if not self.fixed:
            for rows in torch.arange(len(samples), device=self.device).split(self.count):
                yield rows, torch.arange(len(rows), device=self.device), self.count
            return
        chunks, chunk = (samples // CHUNK).unique(return_inverse=True)
        slots, count = chunk * CHUNK + samples % CHUNK, len(chunks) * CHUNK
        for begin in range(0, count, self.count):
            end = min(begin + self.count, count)
            size = end - begin if self._may_run_together(end - begin) else CHUNK
            for first in range(begin, end, size):
                rows = ((slots >= first) & (slots < first + size)).nonzero()[:, 0]
                yield rows, slots[rows] - first, size

    def _run(self, decoder: PackedDecoder | StaticDecoder, labels: Tensor, samples: Tensor, begun: Tensor) -> Tensor:
        """Return codes (R, N) for labels and sample numbers (R,) int64; -1 where logits were not finite.

        ``begun`` (R, M) are the codes so far.
        """
        places = torch.arange(self.config.length, device=self.device)
        numbers = uniform(self.settings.seed, Stream.TOKEN, samples[:, None], places).T.contiguous()  # (N, R)
        codes = self.kept[:, None].repeat(1, len(labels))  # (N, R)
        codes[: begun.shape[1]] = begun.T
        nulls = [torch.full_like(labels, self.config.classes)] if self.halves == 2 else []
        for position in range(begun.shape[1], self.end):
            logits = (self._decode(decoder, codes[position - 1], position) if position
                      else decoder.first(self.beginnings[torch.cat([labels, *nulls])]))  # (2 R or R, V)
            if self.drawn[position]:
                codes[position] = self._draw(logits, numbers[position], position)
        return torch.where((codes < 0).any(0), -1, codes).T

    def _draw(self, logits: Tensor, numbers: Tensor, position: int) -> Tensor:
        """Return codes (R,) from logits (2 R or R, V) at ``position`` and numbers (R,)."""
        scale = self.scales[position]
        logits = guide(logits.float(), scale) if scale > 1 else logits[: len(numbers)].float()  # (R, V)
        return draw(logits, numbers, self.settings)

    def _decode(self, decoder: PackedDecoder | StaticDecoder, codes: Tensor, position: int) -> Tensor:
        """Return logits (2 R or R, V) at ``position``; both halves of a batch go on with the same codes."""
        codes = codes.clamp(min=0)  # not finite: go on with anything, and say so at the end
        halves = self.halves if self.static or position < self.guided_until else 1
        return decoder.next(codes.repeat(halves), position)


def class_inputs(model: Transformer, settings: SamplingSettings) -> Tensor:
    """Return the first input of a sequence by its class, (classes + 1, dim): the class embedding, or a mix of two.

    The null class of guidance, the last one, is never mixed.
    """
    table = model.cls_embedding.embedding_table.weight.detach()  # (classes + 1, dim)
    if settings.mix_with is None:
        return table
    mixed = torch.lerp(table, table[settings.mix_with], settings.mix_share)
    mixed[-1] = table[-1]
    return mixed


def _replays(device: torch.device) -> bool:
    """Tell whether decoding there replays one graph of fixed shapes."""
    return device.type != "cpu"


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    """Switch dropout off for a while, and leave every module in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def draw(logits: Tensor, numbers: Tensor, settings: SamplingSettings) -> Tensor:
    """Draw one code per row by the inverse of the cumulative distribution.

    The sums are float64, and the drawn code is the first whose cumulative mass exceeds the number's share of the
    total. So a code of probability zero is never drawn, not even at the ends.

    Args:
        logits: (B, V) fp32.
        numbers: (B,) float64 in [0, 1).

    Returns:
        (B,) int64; -1 where the logits are not finite.
    """
    mass = filtered(logits, settings).softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, V)
    total = mass[:, -1:]  # (B, 1)
    codes = torch.searchsorted(mass, numbers[:, None] * total, right=True)[:, 0]
    return torch.where(total[:, 0] > 0, codes, -1)


def filtered(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Return logits (B, V) at the temperature, with all that top-k and then top-p leave out at -inf."""
    if settings.temperature != 1:
        logits = logits / settings.temperature
    if settings.top_k:
        logits = keep_top_k(logits, settings.top_k)
    return keep_top_p(logits, settings.top_p) if settings.top_p < 1 else logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return logits (B, V) with all but the k largest of a row at -inf; of equal ones the first stay."""
    least = logits.topk(k).values[:, -1:]  # (B, 1), the k-th largest
    above, equal = logits > least, logits == least
    room = k - above.sum(-1, keepdim=True)  # (B, 1) how many of the equal ones stay
    return logits.masked_fill(~(above | (equal & (equal.cumsum(-1) <= room))), -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (B, V) with all but the nucleus at -inf: the fewest largest whose mass is at least p.

    At least one stays; of equal ones the first (Holtzman et al., arXiv 1904.09751).
    """
    ordered, places = logits.sort(dim=-1, descending=True, stable=True)  # (B, V) each
    mass = ordered.softmax(-1).to(torch.float64)
    before = mass.cumsum(-1) - mass  # the mass of all that are more likely
    ordered = ordered.masked_fill(before >= p * mass.sum(-1, keepdim=True), -math.inf)
    return torch.empty_like(logits).scatter_(-1, places, ordered)
