"""The runs below a folder, as the page shows them: how far each has come, its curves, scores, pictures and config.

A request names a run or a picture by what the page listed, and the name is looked up in a list made anew: no path of a
request is ever opened. Runs may be half-written, broken or a stranger's, so each part of the page is either what a file
says or one line about what is wrong with it.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from mutor_img.app import markup
from mutor_img.checkpoints.folder import newest_checkpoint, peek_meta
from mutor_img.common.errors import UserError, reading
from mutor_img.common.files import read_json, read_lines, read_metrics
from mutor_img.common.folders import is_hidden
from mutor_img.common.images import read_image
from mutor_img.common.locks import folder_lock, owner_of
from mutor_img.common.outputs import RUN_SIGNS
from mutor_img.common.plain_yaml import parse
from mutor_img.metrics import report
from mutor_img.training.log import Point, plot_curves, save_figure

STUDY_SIGNS = {"rows.jsonl", "scores.json"}
INSIDE = {"checkpoints", "pictures", "tensorboard", "wandb"}  # parts of a run, which hold no runs
MOST_FOLDERS, MOST_RUNS = 20_000, 500
MOST_ROWS = 200  # of a table
MOST_PANELS, COLUMNS = 18, 2  # curves in one picture
MOST_PICTURES = 6  # at once
LARGEST = {".jsonl": 256 << 20, ".png": 32 << 20, ".json": 16 << 20, ".md": 1 << 20, ".yaml": 1 << 20}  # bytes
SWEPT = ("cfg_scale", "cfg_schedule", "temperature", "num_samples", "fid", "fd", "is", "precision", "recall",
         "recognised")
COMPARED = ("row", "seed", "updates", "cfg_scale", "fid", "fd", "is", "precision", "recall", "recognised",
            "val_next_token")


class Listing(NamedTuple):
    """What stands below a folder: run folders and studies by the names that the page shows, and what was left out."""

    folders: dict[str, Path]
    notes: list[str]


class View(NamedTuple):
    """One run as HTML, the names of its pictures in their order, and those to show first."""

    head: str
    curves: str
    scores: str
    config: str
    pictures: list[str]
    first: list[str]


def list_runs(root: Path) -> Listing:
    """Return the runs and studies below ``root``, by their paths from there; links are followed, circles are not."""
    folders, notes, seen = {}, [], set()
    walk = os.walk(root, followlinks=True, onerror=lambda error: notes.append(
        f"{_name(root, error.filename)}: this folder cannot be read ({error.strerror})"))
    for folder, inner, files in islice(walk, MOST_FOLDERS):
        place = os.path.realpath(folder)
        if place in seen:
            inner.clear()
            continue
        seen.add(place)
        if {*inner, *files} & (RUN_SIGNS | STUDY_SIGNS):
            folders[_name(root, folder)] = Path(folder)
        inner[:] = sorted(name for name in inner if not is_hidden(name) and name not in INSIDE)
        if len(folders) == MOST_RUNS:
            break
    if next(walk, None):
        notes.append(f"there is more below {markup.printable(str(root))}; start the page with a folder further down")
    return Listing(folders, notes)


def _name(root: Path, folder: str) -> str:
    return markup.printable(os.path.relpath(folder, root))


def overview(listing: Listing) -> str:
    """Return a table of all runs, and what was left out, as HTML."""
    rows = [(name, *_summary(folder)) for name, folder in listing.folders.items()]
    notes = listing.notes if rows else ["No run here yet. A run appears once it has begun.", *listing.notes]
    return ((markup.table(("run", "kind", "updates", "state"), rows) if rows else "")
            + "".join(markup.note(note) for note in notes))


def view(listing: Listing, name: str) -> View:
    """Return all that the page shows of one run.

    Raises:
        UserError: no run of this name is listed.
    """
    folder = _chosen(listing.folders, name, "run")
    pictures = list(list_pictures(folder))
    by_update = [label for label in pictures if " after update " in label]
    return View(markup.title(" · ".join(filter(None, (name, *_summary(folder))))),
                _part(folder / "metrics.jsonl", lambda path: _logged(name, read_curves(folder))),
                _scores(folder), _part(folder / "config.yaml", lambda path: markup.folded(path.name, _text(path))),
                pictures, by_update[-1:] or pictures[:MOST_PICTURES])


def show_pictures(listing: Listing, name: str, labels: Sequence[str]) -> str:
    """Return some of a run's pictures as HTML, in the order of the list.

    Raises:
        UserError: no run or picture of this name is listed, or they are too many.
    """
    known = list_pictures(_chosen(listing.folders, name, "run"))
    if len(labels) > MOST_PICTURES:
        raise UserError(f"{len(labels)} pictures are chosen; choose at most {MOST_PICTURES}")
    chosen = {label: _chosen(known, label, "picture") for label in labels}
    return "".join(_part(chosen[label], lambda path, label=label: markup.picture(label, _png(path)))
                   for label in known if label in chosen)


def _chosen(known: dict[str, Path], name: str, kind: str) -> Path:
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{str(name)[:200]!r}: no such {kind} any more; press Refresh and choose one of the list")
    return known[name]


def _part(path: Path, work: Callable[[Path], str]) -> str:
    """Return what ``work(path)`` makes of a file; "" where there is none, one line where it cannot be read."""
    try:
        if not os.path.lexists(path):
            return ""
        with reading(str(path), kind="file of a run"):
            _check_file(path)
            return markup.printable(work(path))
    except UserError as error:
        return markup.error(markup.printable(str(error)))


def _check_file(path: Path) -> None:
    """Raise :class:`UserError` for what must not be read: a pipe would be waited for, a huge file fills the memory."""
    status, most = path.stat(), LARGEST[path.suffix]
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: not a plain file; remove it")
    if status.st_size > most:
        raise UserError(f"{path}: has {status.st_size:,} bytes; the page reads at most {most:,}")


def _text(path: Path) -> str:
    return path.read_text(errors="replace")


def _png(path: Path) -> bytes:
    data = path.read_bytes()
    read_image(io.BytesIO(data), name=str(path))  # a browser would show nothing in place of half an image
    return data


def _summary(folder: Path) -> tuple[str, str, str]:
    """Return kind, updates and state of a run or study, in words."""
    try:
        with reading(str(folder), kind="run"):
            owner = owner_of(folder_lock(folder))
            if any((folder / sign).exists() for sign in RUN_SIGNS):
                return _progress(folder, owner)
            return "study", "", f"at work: {owner}" if owner else ""
    except UserError as error:
        return "?", "", markup.printable(str(error))


def _progress(folder: Path, owner: str | None) -> tuple[str, str, str]:
    newest, config, metrics = newest_checkpoint(folder), folder / "config.yaml", folder / "metrics.jsonl"
    meta = peek_meta(newest) if newest else {}
    step, steps = meta.get("step", 0), None
    if config.exists():
        _check_file(config)
        steps = int(parse(_text(config), str(config))["train"]["steps"])  # all values are text
    if owner and metrics.exists():  # further than its newest checkpoint
        _check_file(metrics)
        step = max([step, *(row["step"] for row in read_metrics(folder)[-1:])])
    if owner:
        state = f"at work: {owner}"
    elif not newest:
        state = "no complete checkpoint"
    elif steps is None:
        state = "weights alone"
    else:
        state = "done" if step >= steps else "stopped; the same command goes on"
    return str(meta.get("kind", "run")), f"{step:,}" if steps is None else f"{step:,} of {steps:,}", state


def read_curves(folder: Path) -> dict[str, list[Point]]:
    """Return every logged value of a run over its updates, by name; values that are not finite are left out."""
    curves: dict[str, list[Point]] = {}
    for row in read_metrics(folder):
        for name, value in row.items():
            if name not in ("step", "samples") and math.isfinite(value):
                curves.setdefault(markup.printable(name), []).append((int(row["step"]), value))
    return curves


def panels(curves: dict[str, list[Point]]) -> list[dict[str, list[Point]]]:
    """Return the curves that are drawn together: each alone, but a held-out loss with that of training."""
    together = {f"val_{name}" for name in curves} & curves.keys()
    return [{other: curves[other] for other in (name, f"val_{name}") if other in curves}
            for name in curves if name not in together]


def _logged(name: str, curves: dict[str, list[Point]]) -> str:
    """Return what a run has logged as HTML: all curves, and the scores among them in numbers."""
    return _draw(name, panels(curves)) + _held_out(curves) if curves else markup.note("Nothing is logged yet.")


def _draw(name: str, drawn: list[dict[str, list[Point]]]) -> str:
    rows = -(-min(len(drawn), MOST_PANELS) // COLUMNS)
    figure, buffer = Figure(figsize=(4.4 * COLUMNS, 2.4 * rows), layout="constrained"), io.BytesIO()
    places = figure.subplots(rows, COLUMNS, squeeze=False).flat  # (rows, COLUMNS) axes
    for panel in drawn[:MOST_PANELS]:
        plot_curves(next(places), {_short(label): points for label, points in panel.items()})
    for place in places:
        place.set_axis_off()
    save_figure(figure, buffer)
    more = f"; {len(drawn) - MOST_PANELS} more are not drawn" if len(drawn) > MOST_PANELS else ""
    return markup.picture(f"Curves of {name}{more}", buffer.getvalue())


def _short(label: str) -> str:
    return label.lstrip("_")[:40]  # matplotlib leaves names with _ before them out of a legend


def _scores(folder: Path) -> str:
    """Return the scores that stand in a folder as HTML."""
    parts = [_part(folder / "scores.json", lambda path: _judged(read_json(path))),
             _part(folder / "sweep" / "sweep.json", lambda path: markup.text(
                 "Sweep of the guidance", _columns(read_json(path)["points"], SWEPT))),
             _part(folder / "table.md", lambda path: markup.text(path.name, _text(path))),
             _part(folder / "rows.jsonl", lambda path: markup.text(path.name, _columns(read_lines(path), COMPARED)))]
    return "".join(parts)


def _held_out(curves: dict[str, list[Point]]) -> str:
    """Return a table of what was measured on held-out images and on samples while the run trained."""
    rows = [["", "last", "after update", "lowest", "after update", "highest", "after update"]]
    for name, points in curves.items():
        if name.startswith(("val_", "eval_")):
            found = points[-1], min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])
            rows.append([name, *(cell for step, value in found for cell in (f"{value:.5g}", f"{step:,}"))])
    if len(rows) == 1:
        return ""
    return markup.text("While training", "\n".join(report.aligned(rows[: MOST_ROWS + 1])))


def _judged(scores: dict[str, Any]) -> str:
    """Return the scores of evaluate_fid.py, or of each generator of a study."""
    return "".join(markup.text(name, _listed(result) if _is_of_tokenizer(result) else report.table(result))
                   for name, result in scores.get("generators", {"scores.json": scores}).items())


def _is_of_tokenizer(scores: dict[str, Any]) -> bool:
    return "sharpness" in scores and "reference" not in scores  # of reconstruct, without those of evaluate_fid.py


def _listed(scores: dict[str, Any]) -> str:
    """Return the numbers of a tokenizer's scores, a line each."""
    return "\n".join(report.aligned([[name, f"{value:.5g}"] for name, value in scores.items()
                                     if isinstance(value, (int, float))]))


def _columns(rows: Sequence[dict[str, Any]], names: Iterable[str]) -> str:
    """Return the last rows of a table, with those of the columns that any of them has."""
    rows = rows[-MOST_ROWS:]
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    if not names:
        return "No rows yet."
    cells = [[f"{row[name]:.5g}" if isinstance(row.get(name), float) else str(row.get(name, "-")) for name in names]
             for row in rows]
    return "\n".join(report.aligned([names, *cells]))


def list_pictures(folder: Path) -> dict[str, Path]:
    """Return the pictures of a run or study by what the page calls them: by update, then all others."""
    found = {}
    for path in folder.glob("pictures/*.png"):
        if parts := re.fullmatch(r"(.+)_(\d{8,12})", path.stem):
            found[int(parts[2]), parts[1]] = f"{parts[1]} after update {int(parts[2]):,}", path
    others = [path for path in (*folder.glob("*.png"), *folder.glob("sweep/*.png")) if path.name != "loss.png"]
    named = [*(found[place] for place in sorted(found)), *((path.name, path) for path in sorted(others))]
    return {markup.printable(label): path for label, path in named}
