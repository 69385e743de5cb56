"""The points of a sweep, scored one after the other; what is scored is kept and never scored again.

All points share labels and random streams, so that they differ by their settings alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mutor_img.common.errors import UserError, check_range
from mutor_img.common.files import read_record, write_sealed
from mutor_img.common.processes import agree, from_main
from mutor_img.metrics.evaluator import evaluate
from mutor_img.metrics.features import FeatureNetwork
from mutor_img.metrics.references import Reference
from mutor_img.metrics.requirements import SCORES, frechet_key, resolve
from mutor_img.sampling.source import GeneratedImages, SampleSource

FORMAT = "mutor_img sweep 1"
KEPT = (*SCORES, "num_samples", "comparable", "seconds")  # of a result: what a table or a choice may want


class SweepPoint(NamedTuple):
    """The settings that vary."""

    cfg_scale: float
    temperature: float
    cfg_schedule: str = "constant"
    cfg_parameter: float | None = None


def grid(scales: Iterable[float], temperatures: Iterable[float],
         schedules: Iterable[tuple[str, float | None]] = (("constant", None),)) -> list[SweepPoint]:
    """Return every combination, the schedules one after the other and the temperatures within each.

    At scale 1 all schedules are the same: such a point stands there once.

    Args:
        scales, temperatures: their values.
        schedules: name and parameter of each.
    """
    scales, temperatures, points = list(scales), list(temperatures), []
    for number, schedule in enumerate(schedules):
        points += [SweepPoint(scale, temperature, *schedule) for temperature in temperatures for scale in scales
                   if scale != 1 or number == 0]
    return points


def sweep(source: SampleSource, points: Sequence[SweepPoint], count: int, reference: Reference,
          network: FeatureNetwork, *, out: str | os.PathLike | None = None, metrics: Sequence[str] | None = None,
          batch_size: int = 64, progress: bool = False) -> Iterator[dict[str, Any]]:
    """Score the first ``count`` samples of each point; yields one row per point, in order.

    Under torch.distributed every process calls this alike; ranks other than 0 yield empty rows for points that are
    scored now.

    Args:
        source: the checkpoint and the settings that all points share.
        points: what varies.
        count: samples per point.
        reference: what they are scored against; its own features are computed once.
        network: the feature network.
        out: a JSON file that keeps each row as soon as it is there; a row in it is not computed again. None: no file.
        metrics: as for :func:`~mutor_img.metrics.evaluator.evaluate`; "fid" must be among them.
        batch_size: images per process at once.
        progress: bars with an ETA.

    Yields:
        The fields of the point, and those of ``KEPT`` that were scored.

    Raises:
        UserError: settings out of range, ``out`` holds rows of something else, or the scores cannot be computed.
    """
    for point in points:
        _at(source, point).settings.validate(source.loaded.model.config)
    check_range("--num-samples", count, 2, 10**9)
    metrics = resolve(metrics, reference, network)
    if "fid" not in metrics:
        raise UserError("a sweep is judged by the Frechet distance; give --metrics with fid among them")
    key = sweep_key(source, count, reference, network, metrics)
    agree({"points": points, **key})
    kept = {_point(row): row for row in from_main(lambda: _read(out, key))}
    for point in points:
        if point not in kept:
            images = GeneratedImages(_at(source, point), count, batch_size)
            result = evaluate(images, reference, network, metrics=metrics, batch_size=batch_size, progress=progress)
            scores = {name: result[name] for name in KEPT if name in result}
            kept[point] = {**point._asdict(), **scores} if result else {}
            if result and out is not None:
                write_sealed(out, {"key": key, "points": list(kept.values())})
        yield kept[point]


def best_point(rows: Sequence[dict[str, Any]], network: FeatureNetwork) -> dict[str, Any]:
    """Return the row with the lowest Frechet distance; of equal ones the first."""
    return min(rows, key=lambda row: row[frechet_key(network)])


def sweep_key(source: SampleSource, count: int, reference: Reference, network: FeatureNetwork,
              metrics: Sequence[str]) -> dict[str, Any]:
    """Return everything but the point that decides a row, as JSON values."""
    identity = source.identity(count)
    for name in SweepPoint._fields:
        del identity[name]
    return {"format": FORMAT, **identity, "metrics": list(metrics), "features": network.name,
            "features_hash": network.weights_hash, "reference": reference.name,
            "reference_hash": from_main(lambda: reference.sha256)}


def _at(source: SampleSource, point: SweepPoint) -> SampleSource:
    settings = dataclasses.replace(source.settings, **point._asdict())
    return dataclasses.replace(source, settings=settings)


def _point(row: dict[str, Any]) -> SweepPoint:
    return SweepPoint(*(row[name] for name in SweepPoint._fields))


def _read(out: str | os.PathLike | None, key: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that an earlier run kept."""
    if out is None or not Path(out).exists():
        return []
    found = read_record(out)
    try:
        for name, wanted in key.items():
            if found["key"].get(name) != wanted:
                raise UserError(f"{out}: its points were scored with {name} {found['key'].get(name)}, now it is "
                                f"{wanted}; remove the file, or choose another --out")
        return list({_point(row): row for row in found["points"]}.values())
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{out}: was not made by this version of the program; remove it, or choose another "
                        "--out") from None
