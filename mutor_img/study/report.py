"""The table at the end of a study: scores side by side, and where the pictures are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mutor_img.metrics.report import aligned

ROWS = (  # key, what a reader calls it, format
    ("updates", "updates", "{:,.0f}"),
    ("training_seconds", "training seconds", "{:,.0f}"),
    ("cfg_scale", "guidance scale (lowest fd)", "{:g}"),
    ("num_samples", "images scored (N)", "{:,.0f}"),
    ("fd", "Frechet distance (fd)", "{:.2f}"),
    ("recognised", "recognised as asked", "{:.1%}"),
    ("precision", "precision", "{:.3f}"),
    ("recall", "recall", "{:.3f}"),
    ("distinct", "distinct", "{:.1%}"),
    ("same_codes", "copies (codes of a training image)", "{:.0f}"),
    ("nearest_training_distance", "distance to nearest training image", "{:.2f}"),
    ("nearer_than_held_out", "nearer than any held-out image", "{:.0f}"),
    ("nearer_by_chance", "the same by chance", "{:.0f}"),
)


def score_table(scores: dict[str, dict[str, Any]]) -> str:
    """Return the table as text: one column a generator, and beside each its scores at the held-out images' N.

    Args:
        scores: by generator, what :func:`mutor_img.study.pipeline.score_generator` returned.
    """
    columns: dict[str, dict[str, Any]] = {}
    for name, result in scores.items():
        columns[name] = result
        columns[f"{name}, same N"] = result["samples_at_same_n"]
    columns["real held-out"] = next(iter(scores.values()))["real_against_real"]
    lines = [["", *columns]]
    for key, title, form in ROWS:
        if any(key in column for column in columns.values()):
            lines.append([title, *(form.format(c[key]) if c.get(key) is not None else "-" for c in columns.values())])
    return "\n".join(aligned(lines))


def tokenizer_line(scores: dict[str, Any], classifier: dict[str, Any]) -> str:
    """Return one line on what the generators build on: the tokenizer and the digit classifier."""
    return (f"tokenizer on held-out digits: PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.3f}, "
            f"{scores['codes_used']:.0%} of the codes in use; "
            f"digit classifier: {classifier['accuracy']:.1%} of held-out real digits")


def picture_list(paths: list[Path]) -> str:
    """Return the pictures' paths, a line each; a missing one is left out."""
    return "\n".join(f"  {path}" for path in paths if path.is_file())
