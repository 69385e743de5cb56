"""A comparison as pictures: curves with bands, samples side by side, and how well registers predict each target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from mutor_img.common.arrays import load_npy
from mutor_img.common.files import write_atomic
from mutor_img.common.images import grid_picture, write_png
from mutor_img.study.comparison.config import ComparisonConfig
from mutor_img.study.comparison.jobs import Job
from mutor_img.study.comparison.ledger import Place
from mutor_img.study.comparison.report import Cell, cells, frechet, timed_on
from mutor_img.study.comparison.scoring import strip_path
from mutor_img.study.comparison.statistics import standard_error
from mutor_img.training.log import save_figure

ACROSS = {"updates": "updates", "flops": "training FLOPs", "seconds": "training seconds"}
LINES = ("o-", "s--", "^:")
MAPS = 4  # side by side


def draw_all(study: ComparisonConfig, jobs: Sequence[Job], scored: Mapping[Place, dict[str, Any]],
             losses: Mapping[tuple[str, int, int], list[list[float]]]) -> list[Path]:
    """Write every picture that there is something for; returns their paths."""
    folder, made = Path(study.run_dir), []
    for scale in study.guidance:
        if any(place[3] == scale for place in scored):
            made.append(draw_curves(study, scored, scale, folder / f"curves_guidance_{scale:g}.png"))
        made.append(draw_samples(study, jobs, scale, folder / f"samples_guidance_{scale:g}.png"))
    made.append(draw_targets(study, losses, folder / "targets.png"))
    return [path for path in made if path is not None]


def draw_curves(study: ComparisonConfig, scored: Mapping[Place, dict[str, Any]], scale: float, path: Path) -> Path:
    """Draw the Frechet distance against updates, FLOPs and seconds: means, and bands of a standard error.

    Against seconds, only the runs on one kind of device are drawn.
    """
    key, everything = frechet(scored.values()), cells(study, scored, scale)
    devices, _ = timed_on(scored.values())
    timed = [cell for cell in (cell.on(devices) for cell in everything) if cell.lines]
    figure = Figure(figsize=(4.6 * len(ACROSS) + 1.4, 4), layout="constrained")
    axes = figure.subplots(1, len(ACROSS), sharey=True)
    for place, (name, label) in zip(axes, ACROSS.items()):
        found = timed if name == "seconds" else everything
        for number, row in enumerate(row.name for row in study.rows):
            own = [cell for cell in found if cell.row == row]
            line = sorted((cell.mean(name), *mean_and_error(list(cell.values(key).values()))) for cell in own)
            if line:
                x, means, errors = map(np.array, zip(*line))
                style, color = look(number)
                place.errorbar(x, means, errors, fmt=style, color=color, label=row, markersize=3, linewidth=1)
                place.fill_between(x, means - errors, means + errors, color=color, alpha=0.2, linewidth=0)
        place.set(xlabel=label, xscale="log" if wide(found, name, 20) else "linear")
        place.grid(alpha=0.3)
    axes[0].set(ylabel=f"{key.upper()}-{study.samples}", yscale="log" if wide(everything, key, 4) else "linear")
    for ticks in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
        ticks(ScalarFormatter())  # on a logarithmic scale, too: 20, not 2 x 10^1
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.suptitle(f"guidance {scale:g}; bands and bars are one standard error of the mean over seeds to both sides",
                    fontsize=10)
    return write_atomic(path, lambda aside: save_figure(figure, aside))


def look(number: int) -> tuple[str, str]:
    """Return the marks and dashes of a study's row, and its color: matplotlib has ten."""
    again, color = divmod(number, 10)
    return LINES[again % len(LINES)], f"C{color}"


def wide(found: Sequence[Cell], name: str, times: float) -> bool:
    """Tell whether the largest is more than so many times the least: on a linear scale small ones would be one spot."""
    means = [cell.mean(name) for cell in found]
    return bool(means) and max(means) > times * min(means)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, 0 for a single value."""
    return fmean(values), standard_error(values) or 0.0


def draw_samples(study: ComparisonConfig, jobs: Sequence[Job], scale: float, path: Path) -> Path | None:
    """Lay out samples of the first seed, a line per row, after the last updates that all rows share.

    Labels and random streams are the same in every row. Where no checkpoint is shared, each row shows its last. Rows
    whose images are not of the first one's size are left out.
    """
    first = [job for job in jobs if job.seed == study.seeds[0]]
    shared = set.intersection(*(set(job.steps) for job in first)) if first else set()
    strips = {f"{job.row}, {step}": strip_path(study, job, step, scale)
              for job in first for step in [max(shared or job.steps)]}
    there = {name: load_npy(strip, "remove it")
             for name, strip in strips.items() if strip.is_file()}  # (K, H, W, 3) uint8 each
    if not there:
        return None
    size = next(iter(there.values())).shape
    there = {name: strip for name, strip in there.items() if strip.shape == size}
    return write_png(path, grid_picture(np.concatenate(list(there.values())), study.grid_images, row_names=list(there)))


def draw_targets(study: ComparisonConfig, losses: Mapping[tuple[str, int, int], list[list[float]]],
                 path: Path) -> Path | None:
    """Draw the registers' held-out loss per target, rows down and columns right, at each row's last checkpoint."""
    maps = {row.name: target_map(losses, row.name, max(study.steps(row))) for row in study.rows}
    maps = {name: values for name, values in maps.items() if values is not None}
    if not maps:
        return None
    everything = np.concatenate([values.ravel() for values in maps.values()])
    low, high = np.nanmin(everything), np.nanmax(everything)
    columns = min(MAPS, len(maps))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(4 * columns, 3.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for place in axes.flat[len(maps):]:
        place.set_axis_off()
    for place, (name, values) in zip(axes.flat, maps.items()):
        image = place.imshow(values, vmin=low, vmax=high, cmap="viridis")
        for (down, right), value in np.ndenumerate(values):
            if np.isfinite(value):
                place.text(right, down, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white",
                           bbox={"facecolor": "black", "alpha": 0.35, "linewidth": 0, "pad": 1})
        place.set(title=name, xlabel="columns to the right", ylabel="rows down", xticks=range(values.shape[1]),
                  yticks=range(values.shape[0]))
    figure.colorbar(image, ax=axes.ravel().tolist(), label="held-out loss, nats per register")
    # The layout does not know that maps keep their shape, and would cut their titles off.
    return write_atomic(path, lambda aside: save_figure(figure, aside, bbox_inches="tight"))


def target_map(losses: Mapping[tuple[str, int, int], list[list[float]]], row: str, updates: int) -> np.ndarray | None:
    """Return a row's loss per target as an array (rows down, columns right), a mean over seeds; NaN: no such target."""
    found = [values for (name, _, step), values in losses.items() if (name, step) == (row, updates)]
    if not found:
        return None
    places = {(int(down), int(right)) for values in found for down, right, _ in values}
    table = np.full((1 + max(down for down, _ in places), 1 + max(right for _, right in places)), np.nan)
    for down, right in places:
        table[down, right] = fmean(loss for values in found for d, r, loss in values if (d, r) == (down, right))
    return table
