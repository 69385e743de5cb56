"""A sweep as a table, as a picture, and as advice on what to run next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mutor_img.common.files import write_atomic
from mutor_img.decoding.guidance import schedule_text
from mutor_img.metrics.report import aligned, shortened
from mutor_img.metrics.requirements import SCORES
from mutor_img.training.log import save_figure


def schedule_note(row: dict[str, Any]) -> str:
    """Return ", linear" and the like; nothing for constant guidance."""
    text = schedule_text(row["cfg_schedule"], row["cfg_parameter"])
    return "" if text == "constant" else f", {text}"


def table(rows: Sequence[dict[str, Any]], best: dict[str, Any]) -> str:
    """Return one line per point; a star marks the best."""
    keys = [key for key in SCORES if key in rows[0]]
    size = shortened(rows[0]["num_samples"])
    lines = [["cfg-scale", "temperature", *(f"{SCORES[key]}-{size}" if key in ("fid", "fd", "sfid") else SCORES[key]
                                            for key in keys), "seconds", ""]]
    for row in rows:
        lines.append([f"{row['cfg_scale']:g}{schedule_note(row)}", f"{row['temperature']:g}",
                      *(f"{row[key]:.4f}" for key in keys), f"{row['seconds']:.0f}", "*" if row is best else " "])
    return "\n".join(line.rstrip() for line in aligned(lines))


def advice(rows: Sequence[dict[str, Any]], best: dict[str, Any], key: str) -> list[str]:
    """Return sentences on the best point and on how far to trust it."""
    size, name = best["num_samples"], SCORES[key]
    lines = [f"lowest {name}-{shortened(size)}: cfg-scale {best['cfg_scale']:g}, temperature {best['temperature']:g}"
             + schedule_note(best),
             f"{name} of {size} samples is higher than that of 50000, because its bias falls as 1/N: compare these "
             "rows only with each other"]
    for setting in ("cfg_scale", "temperature"):
        values = sorted({row[setting] for row in rows
                         if schedule_note(row) == schedule_note(best) or row["cfg_scale"] == 1})  # 1 is in all of them
        if len(values) > 1 and best[setting] in (values[0], values[-1]) and not (
                setting == "cfg_scale" and best[setting] == 1):
            flag = setting.replace("_", "-")
            lines.append(f"it is at the end of the {flag}s: the lowest may be beyond {best[setting]:g}")
    return lines


def draw(rows: Sequence[dict[str, Any]], best: dict[str, Any], key: str, path: str | Path) -> Path:
    """Draw the Frechet distance, and what else was scored, over the setting that has more values; returns the path."""
    across, curves = "cfg_scale", "temperature"
    if len({row["temperature"] for row in rows}) > len({row["cfg_scale"] for row in rows}):
        across, curves = curves, across
    panels = [[key], *([name] for name in ("is",) if name in best), *([["precision", "recall"]] * ("recall" in best))]
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for place, names in zip(axes[0], panels):
        for number, (note, value) in enumerate(dict.fromkeys((schedule_note(row), row[curves]) for row in rows)):
            chosen = sorted((row for row in rows if (schedule_note(row), row[curves]) == (note, value)),
                            key=lambda row: row[across])
            for name, style in zip(names, ("o-", "s--")):
                label = f"{SCORES[name]}, " * (len(names) > 1) + f"{curves.replace('_', '-')} {value:g}{note}"
                place.plot([row[across] for row in chosen], [row[name] for row in chosen], style, label=label,
                           color=f"C{number}", markersize=4, linewidth=1)
        place.set(xlabel=across.replace("_", "-"), ylabel=" and ".join(SCORES[name] for name in names))
        place.grid(alpha=0.3)
        place.legend(fontsize=7)
    axes[0][0].plot(best[across], best[key], "*", color="black", markersize=12, zorder=3)
    figure.suptitle(f"{best['num_samples']} samples per point; the star is the lowest {SCORES[key]}", fontsize=10)
    return write_atomic(path, lambda aside: save_figure(figure, aside))
