"""A result as lines for a person."""

from __future__ import annotations

from typing import Any

from mutor_img.metrics.requirements import SCORES


def shortened(count: int) -> str:
    """50000 -> "50k", 1500 -> "1500"."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def table(result: dict[str, Any]) -> str:
    """Return the scores; the columns are the samples and, if scored, the held-out images."""
    columns = {"samples": result}
    if "real_against_real" in result:
        if result["samples_at_same_n"]["num_samples"] != result["num_samples"]:
            columns["samples, same N"] = result["samples_at_same_n"]
        columns["held-out real"] = result["real_against_real"]
    # A column of another N must not stand under the name of this one.
    size = f"-{shortened(result['num_samples'])}" if len(columns) == 1 else ""
    names = {**SCORES, **{key: SCORES[key] + size for key in ("fid", "fd", "sfid", "kid", "kd")},
             "is": "Inception Score", "nearest_training_distance": "nearest training image",
             "nearer_than_held_out": "nearer than any held-out", "nearer_by_chance": "nearer by chance",
             "num_samples": "images (N)"}
    rows = [["", *columns]]
    for key, name in names.items():
        if any(key in column for column in columns.values()):
            rows.append([name, *(_number(column.get(key)) for column in columns.values())])
    reference = result["reference"]
    return "\n".join([
        *aligned(rows),
        f"features {result['features']} ({result['weights_sha256'][:8]}), reference {reference['name']} "
        f"(role {reference['role'] or 'undeclared'}; {reference['statistics']}), "
        f"labels {result['labels'] or 'unknown'}, "
        f"{'' if result['comparable'] else 'not '}comparable with published scores",
        *(["", *class_table(columns)] if "per_class" in result else []),
    ])


def class_table(columns: dict[str, dict[str, Any]]) -> list[str]:
    """Return one line per class: the share recognised, and the share in more than one piece, in each column.

    Args:
        columns: scores with ``per_class`` by the column's name; a column without is left out.
    """
    parts = {name: scores["per_class"] for name, scores in columns.items() if "per_class" in scores}
    rows = [["class", *(f"{title}: {name}" for title in ("recognised", "in pieces") for name in parts)]]
    for label in dict.fromkeys(label for part in parts.values() for label in part):
        rows.append([label, *(f"{part[label][key]:.1%}" if label in part else "-"
                              for key in ("recognised", "in_pieces") for part in parts.values())])
    return aligned(rows)


def aligned(rows: list[list[str]]) -> list[str]:
    """Return rows of cells as lines: the first column flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
            for row in rows]


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"
