"""What a run leaves to look at: metrics as JSON lines, TensorBoard events, a loss-curve picture, log lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from mutor_img.common.errors import UserError
from mutor_img.common.files import read_lines, write_atomic
from mutor_img.training.task import Task


class RunLog:
    """Writes ``metrics.jsonl``, TensorBoard events and ``loss.png`` of one run; used on rank 0 only."""

    def __init__(self, run_dir: Path, start_step: int):
        """Open the log, forgetting rows of updates past ``start_step``, which a resumed run will do again."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self.rows = [row for row in read_metrics(run_dir) if row["step"] <= start_step]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomic(run_dir / "metrics.jsonl", lambda path: path.write_text(text))
        self.file = open(run_dir / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (open for the run)
        self.events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record named numbers of update ``step`` everywhere."""
        row = {"step": step, **values}
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self.events.add_scalar(name, value, step)

    def draw(self, names: tuple[str, ...]) -> Path:
        """Draw the named values over the steps into ``loss.png``; returns its path."""
        from matplotlib.figure import Figure  # a second to import

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name in names:
            points = [(row["step"], row[name]) for row in self.rows if name in row]
            if points:
                axes.plot(*zip(*points), label=name, marker="." if len(points) < 30 else None, linewidth=1)
        axes.set(xlabel="updates", ylabel="loss", title=str(self.run_dir))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        return write_atomic(self.run_dir / "loss.png", lambda aside: figure.savefig(aside, format="png", dpi=120))

    def close(self) -> None:
        """Flush and close the files."""
        self.file.close()
        self.events.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ``metrics.jsonl``; a last row that a kill cut short is left out.

    Raises:
        UserError: a row is damaged.
    """
    rows = read_lines(run_dir / "metrics.jsonl")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise UserError(f"{run_dir / 'metrics.jsonl'}, line {number}: says no step; mend or remove that line")
    return rows


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
