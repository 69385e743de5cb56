"""What a run leaves to look at: metrics as JSON lines, what its trackers keep, a loss-curve picture, log lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from torch.utils.tensorboard import SummaryWriter

from mutor_img.common.files import read_metrics, write_atomic
from mutor_img.training.task import Task
from mutor_img.training.trackers import open_wandb, show_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[int, float]  # step and value
MOST_POINTS = 2000  # of one curve; a picture has fewer columns of pixels


class RunLog:
    """Writes ``metrics.jsonl``, ``loss.png`` and what ``train.trackers`` asks for; used on rank 0 only."""

    def __init__(self, config: Any, start_step: int, evaluated: bool = True):
        """Open the log, forgetting rows of updates past ``start_step``, which a resumed run will do again.

        Args:
            config: has ``run_dir`` and ``train.trackers``.
            start_step: updates done.
            evaluated: False: the last one's validation and scores are done again too.

        Raises:
            UserError: a tracker cannot begin.
        """
        self.run_dir = run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.wandb = open_wandb(config) if "wandb" in config.train.trackers else None
        of_update = {"samples", "skipped"}  # the row of an update itself has one of these
        self.rows = [row for row in read_metrics(run_dir) if row["step"] < start_step or (
            row["step"] == start_step and (evaluated or row.keys() & of_update))]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomic(run_dir / "metrics.jsonl", lambda path: path.write_text(text))
        self.file = open(run_dir / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (open for the run)
        self.events = None
        if "tensorboard" in config.train.trackers:
            purge = start_step + 1 if start_step else None
            self.events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record named numbers of update ``step`` everywhere."""
        row = {"step": step, **values}
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        if self.events:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
        if self.wandb:  # the last value of each name is in its summary, too
            self.wandb.log(values, step=step)

    def show(self, folder: Path, step: int) -> None:
        """Give the trackers that take pictures those that were drawn in ``folder`` after update ``step``."""
        for path in sorted(folder.glob(f"*_{step:08d}.png")) if self.wandb else ():
            show_picture(self.wandb, path.stem.removesuffix(f"_{step:08d}"), path, step)

    def draw(self, names: tuple[str, ...]) -> Path:
        """Draw the named values over the steps into ``loss.png``; returns its path."""
        from matplotlib.figure import Figure  # a second to import

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        plot_curves(axes, {name: [(row["step"], row[name]) for row in self.rows if name in row] for name in names})
        axes.set(ylabel="loss", title=str(self.run_dir))
        return write_atomic(self.run_dir / "loss.png", lambda aside: save_figure(figure, aside))

    def close(self) -> None:
        """Flush and close everything."""
        self.file.close()
        if self.events:
            self.events.close()
        if self.wandb:
            self.wandb.finish()


def plot_curves(axes: Axes, curves: dict[str, Sequence[Point]]) -> None:
    """Draw curves over the updates, by name; one without points is left out."""
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*thinned(points)), label=name, marker="." if len(points) < 30 else None, linewidth=1)
    axes.set(xlabel="updates")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> Sequence[Point]:
    """Return at most ``most`` of the points of a curve, in their order: its ends, and each part's lowest and highest.

    So a peak of one update stays in sight, which every n-th point would miss.

    Args:
        points: in the order of their steps, values finite.
        most: 4 or more.
    """
    if len(points) <= most:
        return points
    parts, inner = most // 2 - 1, points[1:-1]
    kept = [points[0]]
    for part in range(parts):
        some = inner[part * len(inner) // parts : (part + 1) * len(inner) // parts]
        kept += sorted({min(some, key=lambda point: point[1]), max(some, key=lambda point: point[1])})
    return [*kept, points[-1]]


def save_figure(figure: Figure, target: Path | BinaryIO, **options: Any) -> None:
    """Write a figure as PNG, every text as it is: to matplotlib, what stands between two $ would be a formula.

    So it is in the numbers of a logarithmic axis, which stay formulas.

    Args:
        figure, target: what, and where to.
        options: further ones of ``Figure.savefig``.
    """
    from matplotlib.text import Text

    numbers = {text for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for minor in (True, False)
               for text in axis.get_ticklabels(minor=minor)}
    for text in set(figure.findobj(Text)) - numbers:
        text.set_parse_math(False)
    figure.savefig(target, format="png", dpi=120, **options)


def log_line(values: dict[str, float], step: int, steps: int, task: Task, seconds_a_step: float) -> str:
    """Return one line: step, samples, losses, gradient norm, lr, throughput, MFU, ETA."""
    left = int(seconds_a_step * (steps - step))
    parts = [f"step {step}/{steps}", f"samples {values['samples']}"]
    parts += [f"{name} {values[name]:.4f}" for name in task.headline if name in values]
    parts += [f"grad {values['gradient_norm']:.3f}", f"lr {values['lr']:.2e}",
              f"{values[f'{task.unit}_per_second']:,.0f} {task.unit}/s"]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    return " · ".join([*parts, f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"])
