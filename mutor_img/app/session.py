"""What the page does, whatever draws it: from what its controls say to the images of ``sample.py``, as they come."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mutor_img.app import markup
from mutor_img.common.errors import UserError, check_range
from mutor_img.decoding.sampler import CHUNK
from mutor_img.sampling.editing import edit
from mutor_img.sampling.labels import class_words
from mutor_img.sampling.source import GeneratedImages, SampleSource

MAX_IMAGES = 256  # a checkpoint; the page holds all of them
GPU_PART = 32  # images at a time on GPUs, between two looks at the page; CPUs run on CHUNK anyway
EXACT = 2**53  # the browser's numbers are exact up to here


@dataclass(frozen=True)
class Side:
    """One of the checkpoints that are shown.

    Attributes:
        path: as the user gave it.
        checkpoint: what that meant when the page began: the same weights still, where a run trains on.
        tokenizer: as the user gave it; None: the run's own.
        source: what is loaded, with the settings of the command line.
    """

    path: str
    checkpoint: str
    tokenizer: str | None
    source: SampleSource

    @property
    def title(self) -> str:
        """The checkpoint in a few words."""
        loaded = self.source.loaded
        step = [f"step {loaded.meta['step']}"] if "step" in loaded.meta else []
        return " · ".join([self.path, *step, f"{loaded.which} weights", self.source.dtype])


@dataclass(frozen=True)
class Controls:
    """The page's controls as the browser sends them: an emptied number is None, and 3 may come as 3.0.

    Attributes:
        classes: labels to choose from; none: all.
        labels: rule of the labels.
        count: images of each checkpoint.
        cfg_scale, temperature, top_k, top_p, seed: see :class:`~mutor_img.decoding.sampler.SamplingSettings`.
        mix_with, mix_share: a list of the class that each label is mixed with, or of none; and its share.
        keep, mask: files of an image whose codes are kept, and of its mask; None: none.
    """

    classes: list[int]
    labels: str
    count: float | None
    cfg_scale: float | None
    temperature: float | None
    top_k: float | None
    top_p: float | None
    seed: float | None
    mix_with: Sequence[int] = ()
    mix_share: float | None = 0.5
    keep: str | None = None
    mask: str | None = None

    def read_count(self) -> int:
        """Return the number of images.

        Raises:
            UserError: not a whole number, or out of range.
        """
        count = _whole("number of images", self.count)
        check_range("number of images", count, 1, MAX_IMAGES)
        return count

    def apply(self, source: SampleSource) -> SampleSource:
        """Return ``source`` with what the controls say; its guidance schedule and weights stay.

        Raises:
            UserError: a value that is missing, not a number of its kind, or out of range.
        """
        for label in self.classes:
            check_range("class", label, 0, len(source.names) - 1)
        seed = _whole("seed", self.seed)
        check_range("seed", seed, -EXACT, EXACT)
        settings = dataclasses.replace(
            source.settings, cfg_scale=_number("guidance scale", self.cfg_scale),
            temperature=_number("temperature", self.temperature), top_k=_whole("top-k", self.top_k),
            top_p=_number("top-p", self.top_p), seed=seed)
        settings.validate(source.loaded.model.config)
        source = dataclasses.replace(source, settings=settings, rule=self.labels, classes=list(self.classes) or None)
        mix = (self.mix_with[0], _number("share", self.mix_share)) if self.mix_with else (None, None)
        return edit(source, self.keep, self.mask, *mix)


def _number(name: str, value: float | None) -> float:
    if value is None:
        raise UserError(f"{name} is empty; give a number")
    return float(value)


def _whole(name: str, value: float | None) -> int:
    if not _number(name, value).is_integer():
        raise UserError(f"{name} is {value}; give a whole number")
    return int(value)


def check_comparable(sides: Sequence[Side]) -> None:
    """Raise :class:`~mutor_img.common.errors.UserError` unless all sides have the same classes."""
    first = sides[0]
    for side in sides[1:]:
        ours, theirs = first.source.names, side.source.names
        if len(ours) != len(theirs):
            raise UserError(f"{side.path}: has {len(theirs)} classes, but {first.path} has {len(ours)}; compare "
                            "checkpoints of the same classes")
        for label, (our, their) in enumerate(zip(ours, theirs)):
            if our != their:
                raise UserError(f"{side.path}: its class {label} is {their!r}, but that of {first.path} is {our!r}; "
                                "compare checkpoints of the same classes")


def sample_in_turn(sources: Sequence[SampleSource], count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Make images 0 .. count - 1 of each source, all on one device; they take turns, so that all are seen to grow.

    Yields:
        The source's place and its next images, (b, H, W, 3) uint8: those that ``sample.py`` writes at these places.

    Raises:
        UserError: weights that give logits which are not finite.
    """
    part = CHUNK if sources[0].device.type == "cpu" else GPU_PART
    turns = [iter(GeneratedImages(source, count, part)) for source in sources]
    for _ in range(0, count, part):
        for place, turn in enumerate(turns):
            yield place, next(turn)


def command_line(side: Side, source: SampleSource, count: int, out: str) -> str:
    """Return the ``sample.py`` command that writes the images of this source to ``out``."""
    settings = dataclasses.asdict(source.settings)
    keep, mask = source.kept_from or (None, None)
    mix_with = settings.pop("mix_with")
    del settings["kept"]  # the codes; the flags name the files
    flags = {"checkpoint": side.checkpoint, "tokenizer": side.tokenizer, "weights": source.loaded.which,
             "dtype": source.dtype,
             "classes": class_words(source.classes, source.names, source.run_names) if source.classes else None,
             **({} if source.loaded.meta else {"grid-size": "x".join(map(str, source.loaded.model.config.grid))}),
             "resize": source.resize, "labels": source.rule, "num-samples": count,
             **settings, "keep": keep, "mask": mask,
             "mix-with": None if mix_with is None else class_words([mix_with], source.names, source.run_names),
             "out": out}
    words = ["python", "sample.py"]
    for name, value in flags.items():
        if value is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join(words)


@dataclass(frozen=True)
class View:
    """What the page shows at a moment, as HTML; None: what it showed before.

    Attributes:
        status: progress, or what is wrong.
        commands: plain text, the commands that make the same images.
        grids: one for each side.
    """

    status: str
    commands: str | None
    grids: list[str | None]


def answer(sides: Sequence[Side], controls: Controls) -> Iterator[View]:
    """Yield what the page shows from the press of the button to the last image; a mistake is a view, too."""
    unchanged = [None] * len(sides)
    try:
        count = controls.read_count()
        sources = [controls.apply(side.source) for side in sides]
        grids = [markup.Grid(side.title, source.labels(count).tolist(), source.names)
                 for side, source in zip(sides, sources)]
        commands = "\n".join(command_line(side, source, count, f"samples_{place + 1}.npz")
                             for place, (side, source) in enumerate(zip(sides, sources)))
        total, done, begun = count * len(sides), 0, time.perf_counter()
        yield View(markup.progress(0, total, 0.0), commands, [grid.html() for grid in grids])
        for place, images in sample_in_turn(sources, count):
            grids[place].add(images)
            done += len(images)
            yield View(markup.progress(done, total, time.perf_counter() - begun), None,
                       [grid.html() if grid is grids[place] else None for grid in grids])
        seconds = time.perf_counter() - begun
        yield View(markup.note(f"{total} images in {seconds:.1f} s ({total / seconds:.1f} per s)."), None, unchanged)
    except UserError as error:
        yield View(markup.error(str(error)), None, unchanged)
