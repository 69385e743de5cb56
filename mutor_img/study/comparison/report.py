"""A comparison as Markdown: a table for each guidance scale, and in words what it shows and what it doesn't."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from mutor_img.metrics.report import shortened
from mutor_img.metrics.requirements import SCORES
from mutor_img.study.comparison.config import ComparisonConfig
from mutor_img.study.comparison.ledger import Place
from mutor_img.study.comparison.statistics import (
    Interval,
    Pooled,
    not_separated,
    paired,
    pooled,
    standard_error,
    t_interval,
)

DIGITS = {"sfid": 2, "is": 1, "precision": 3, "recall": 3, "kid": 4, "kd": 4, "recognised": 3, "distinct": 3,
          "val_next_token": 4, "val_next_token_raw": 4}
NAMES = {**SCORES, "val_next_token": "held-out loss", "val_next_token_raw": "held-out loss, raw weights"}
EQUAL_FLOPS = 0.01  # costs that differ by no more are equal: updates are whole numbers


class Cell(NamedTuple):
    """A row of the study at one checkpoint and one guidance scale: its lines, by seed."""

    row: str
    updates: int
    lines: dict[int, dict[str, Any]]

    def values(self, key: str) -> dict[int, float]:
        """Return a score by seed, for seeds that have it."""
        return {seed: line[key] for seed, line in self.lines.items() if line.get(key) is not None}

    def mean(self, key: str) -> float:
        """Return the mean of a score over seeds."""
        return fmean(self.values(key).values())

    def on(self, devices: str) -> Cell:
        """Return the lines of the runs that were trained on these devices."""
        return self._replace(lines={seed: line for seed, line in self.lines.items() if _devices(line) == devices})


def _devices(line: Mapping[str, Any]) -> str:
    return line.get("trained_on") or ""  # older lines do not say


def timed_on(lines: Iterable[Mapping[str, Any]]) -> tuple[str, bool]:
    """Return the devices that most of these lines were trained on, and whether all were.

    Seconds on other devices cannot be averaged with theirs.
    """
    counts = Counter(map(_devices, lines))
    return (counts.most_common(1)[0][0] if counts else ""), len(counts) < 2


def frechet(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return the name of the Frechet distance in these lines, "fid" or "fd"."""
    return "fid" if any("fid" in line for line in lines) else "fd"


def cells(study: ComparisonConfig, scored: Mapping[Place, dict[str, Any]], scale: float) -> list[Cell]:
    """Return what is scored at a guidance scale: by updates, and within these in the order of the study's rows."""
    found: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for (row, seed, updates, at), line in scored.items():
        if at == scale:
            found.setdefault((row, updates), {})[seed] = line
    order = {row.name: place for place, row in enumerate(study.rows)}
    return [Cell(row, updates, found[row, updates])
            for row, updates in sorted(found, key=lambda place: (place[1], order[place[0]]))]


def difference(cell: Cell, baseline: Cell | None, key: str) -> Interval | float | None:
    """Return a score's difference from the baseline, paired by seed; for one seed the number alone, for none None."""
    found = [] if baseline is None else paired(cell.values(key), baseline.values(key))
    return t_interval(found) or (found[0] if found else None)


def pooled_at(study: ComparisonConfig, found: Sequence[Cell], updates: int, key: str) -> Pooled | None:
    """Return how far all rows are from the baseline after so many updates, as differences of logarithms, noise pooled.

    The noise of a Frechet distance is nearly proportional to it, so that on this scale it is alike in all rows. None
    where two rows alone are scored, which say no more together than each pair of their values, or nothing is left.
    """
    values = {cell.row: cell.values(key) for cell in found if cell.updates == updates}
    if len(values) < 3 or study.baseline_name not in values:
        return None
    if any(value <= 0 for of_row in values.values() for value in of_row.values()):  # a copy of the reference
        return None
    logs = {row: {seed: math.log(v) for seed, v in of_row.items()} for row, of_row in values.items()}
    by_noise = pooled(logs, study.baseline_name)
    return by_noise if by_noise and by_noise.differences else None


def of_equal_flops(study: ComparisonConfig, found: Sequence[Cell], cell: Cell) -> Cell | None:
    """Return the baseline's checkpoint of as many training FLOPs as a row's, after another number of updates."""
    flops = cell.mean("flops")  # where registers stand depends on the seed, and FLOPs with it
    return next((other for other in found if other.row == study.baseline_name and other.updates != cell.updates
                 and cell.row != other.row and abs(other.mean("flops") / flops - 1) <= EQUAL_FLOPS), None)


def markdown(study: ComparisonConfig, scored: Mapping[Place, dict[str, Any]], missing: int) -> str:
    """Return the whole page.

    Args:
        study: its config.
        scored: the lines that count, by place.
        missing: how many places are not scored yet.
    """
    seeds = ", ".join(map(str, dict.fromkeys(seed for row in study.rows for seed in study.seeds_of(row))))
    devices, all_of_them = timed_on(scored.values())
    whose = "" if all_of_them else f", of the runs on {devices or 'devices that their lines do not name'}"
    lines = [f"# {study.run_dir}", "",
             f"Mean ± standard error over the seeds {seeds}. A difference is the row's score minus that of "
             f"{study.baseline_name} after as many updates, seed by seed, with its 95 % t interval. \"Noise pooled\" "
             "is how many per cent a row lies above the baseline, estimated from all rows and seeds at once, with one "
             "relative noise for all rows. Intervals are not widened for there being several. FLOPs and seconds are "
             f"those of training, forward and backward; seconds are a mean over seeds{whose}. Sampled parameters are "
             "what sampling uses, trained ones include what is dropped after training."]
    if missing:
        lines.append(f"\n**{missing} of {missing + len(scored)} scores are still to come.**")
    for scale in study.guidance:
        found = cells(study, scored, scale)
        if found:
            key = frechet(scored.values())
            table = _table(study, found, key, devices)
            lines += ["", f"## Guidance {scale:g}", "", *table, "", *words(study, found, key)]
    return "\n".join(lines) + "\n"


def _table(study: ComparisonConfig, found: Sequence[Cell], key: str, devices: str) -> list[str]:
    extra = [name for name in DIGITS if any(cell.values(name) for cell in found)]
    # Three digits of the smallest distance, and two places at least.
    digits = max(2, 2 - math.floor(math.log10(max(1e-9, min(cell.mean(key) for cell in found)))))
    head = ["row", "updates", "FLOPs", "seconds", "sampled parameters", "trained parameters", "seeds",
            f"{key.upper()}-{shortened(study.samples)}", f"against {study.baseline_name}",
            *(NAMES[name] for name in extra)]
    equal = {(cell.row, cell.updates): of_equal_flops(study, found, cell) for cell in found}
    told = any(equal.values())
    if told:
        head.insert(9, f"against {study.baseline_name} of equal FLOPs")
    by_all = {updates: pooled_at(study, found, updates, key) for updates in {cell.updates for cell in found}}
    told_by_all = any(by_all.values())
    if told_by_all:
        head.insert(9, f"against {study.baseline_name}, noise pooled")
    rows = [head, ["---", *["--:"] * (len(head) - 1)]]
    for cell in found:
        first, costly = next(iter(cell.lines.values())), equal[cell.row, cell.updates]
        at = (study.baseline_name, cell.updates)
        by_noise = by_all[cell.updates]
        same = next((other for other in found if (other.row, other.updates) == at), None)
        rows.append([cell.row, f"{cell.updates:,}", f"{first['flops']:.4g}", _seconds(cell.on(devices)),
                     f"{first['sampled_parameters']:,}", f"{first['trained_parameters']:,}", str(len(cell.lines)),
                     _with_error(cell, key, digits),
                     "" if cell is same else _shown(difference(cell, same, key), digits),
                     *[relative(by_noise.differences.get(cell.row)) if by_noise and cell is not same else ""]
                     * told_by_all,
                     *[_shown(difference(cell, costly, key), digits) if costly else ""] * told,
                     *(_with_error(cell, name, DIGITS[name]) for name in extra)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _with_error(cell: Cell, key: str, digits: int) -> str:
    values = list(cell.values(key).values())
    if not values:
        return "-"
    error = standard_error(values)
    return f"{fmean(values):.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _seconds(cell: Cell) -> str:
    if not cell.lines:
        return "-"
    seconds = cell.mean("seconds")
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def _shown(found: Interval | float | None, digits: int) -> str:
    if found is None:
        return "-"
    if isinstance(found, float):
        return f"{found:+.{digits}f} (one seed)"
    return f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def relative(found: Interval | None) -> str:
    """Return a difference of logarithms and its interval in per cent, as in "-7.8 % [-13.3, -1.8]"."""
    if found is None:
        return "-"
    mean, low, high = (f"{100 * math.expm1(value):+.1f}" for value in found)
    return f"{mean} % [{low}, {high}]"


def words(study: ComparisonConfig, found: Sequence[Cell], key: str) -> list[str]:
    """Return sentences: which rows the intervals separate from the baseline, and which not from the lowest mean."""
    lines, name, distance = [], study.baseline_name, key.upper()
    for updates in dict.fromkeys(cell.updates for cell in found):
        here = {cell.row: cell for cell in found if cell.updates == updates}
        base, values = here.get(name), {row: cell.values(key) for row, cell in here.items()}
        if list(here) == [name]:
            continue  # the baseline's own further checkpoints
        against = {row: difference(cell, base, key) for row, cell in here.items() if cell is not base}
        known = {row: d for row, d in against.items() if isinstance(d, Interval)}
        parts = _verdicts(known, name, distance)
        several = [row for row in here if len(values[row]) > 1]
        lowest = min(several, default=name, key=lambda row: here[row].mean(key))
        if base is not None and lowest != name:
            near = [row for row in not_separated(values, lowest) if row != name]
            parts.append(f"the lowest mean is that of {lowest}"
                         + f", which no interval separates from {listed(near)}" * bool(near))
        if base is None:
            parts.append(f"{name} is not scored, so that no row is compared with it")
        elif len(known) < len(against):
            few = [row for row in against if row not in known]
            parts.append(f"{having(few)} fewer than two seeds in common with {name}, and so no interval")
        lines.append(f"- After {updates:,} updates: {'; '.join(parts)}.")
        if by_noise := pooled_at(study, found, updates, key):
            lines.append(f"- After {updates:,} updates, with the noise of all rows pooled (a standard deviation of "
                         f"{by_noise.noise:.1%} with {by_noise.freedom} degrees of freedom): "
                         f"{'; '.join(_verdicts(by_noise.differences, name, distance))}.")
    return lines + _words_of_equal_flops(study, found, key)


def _verdicts(differences: Mapping[str, Interval], name: str, distance: str) -> list[str]:
    """Return phrases: which rows have a lower distance than one, which a higher, and which neither."""
    better = [row for row, d in differences.items() if d.high < 0]
    worse = [row for row, d in differences.items() if d.low > 0]
    same = [row for row, d in differences.items() if not d.separated]
    return ([f"{having(better)} a lower {distance} than {name}"] * bool(better)
            + [f"{having(worse)} a higher {distance} than {name}"] * bool(worse)
            + [f"no interval separates {listed(same)} from {name}"] * bool(same))


def _words_of_equal_flops(study: ComparisonConfig, found: Sequence[Cell], key: str) -> list[str]:
    """Return a sentence for each checkpoint that the baseline can be held against at equal FLOPs."""
    lines = []
    for cell in found:
        other = of_equal_flops(study, found, cell)
        apart = difference(cell, other, key)
        if isinstance(apart, Interval):
            how = "a lower" if apart.high < 0 else "a higher" if apart.low > 0 else "no clearly other"
            lines.append(f"- At equal FLOPs: {cell.row} after {cell.updates:,} updates has {how} {key.upper()} than "
                         f"{study.baseline_name} after {other.updates:,}.")
    return lines


def having(names: Sequence[str]) -> str:
    """Return "a has", or "a, b and c have"."""
    return f"{listed(names)} {'has' if len(names) == 1 else 'have'}"


def listed(names: Sequence[str]) -> str:
    """Return "a, b and c"; of no names ""."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
