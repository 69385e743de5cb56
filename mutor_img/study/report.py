"""The table at the end of a study: scores side by side, and where the pictures are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mutor_img.metrics.report import aligned, class_table

ROWS = (  # key, what a reader calls it, format
    ("updates", "updates", "{:,.0f}"),
    ("training_seconds", "training seconds", "{:,.0f}"),
    ("cfg_scale", "guidance scale", "{:g}"),
    ("cfg_schedule", "guidance schedule", "{}"),
    ("top_p", "top-p", "{:g}"),
    ("num_samples", "images scored (N)", "{:,.0f}"),
    ("fd", "FD (Frechet distance)", "{:.2f}"),
    ("recognised", "recognised as asked", "{:.1%}"),
    ("precision", "precision", "{:.3f}"),
    ("recall", "recall", "{:.3f}"),
    ("distinct", "distinct", "{:.1%}"),
    ("same_codes", "copies (codes of a training image)", "{:.0f}"),
    ("nearest_training_distance", "distance to nearest training image", "{:.2f}"),
    ("nearer_than_held_out", "nearer than any held-out image", "{:.0f}"),
    ("nearer_by_chance", "the same by chance", "{:.0f}"),
)


def score_table(scores: dict[str, dict[str, Any]], reconstructions: dict[str, Any]) -> str:
    """Return the tables as text: the scores, and below them what is recognised and what is in pieces per class.

    There is one column per generator, and beside each its scores at the held-out images' N; then the held-out images
    after the tokenizer alone, and as they are. Read from the right, they show which step spoils the pictures.

    Args:
        scores: by generator, what :func:`mutor_img.study.pipeline.score_generator` returned.
        reconstructions: the scores of the held-out images, encoded and decoded.
    """
    columns: dict[str, dict[str, Any]] = {}
    for name, result in scores.items():
        columns[name] = result
        columns[f"{name}, same N"] = result["samples_at_same_n"]
    held_out = {"real, encoded and decoded": reconstructions,
                "real held-out": next(iter(scores.values()))["real_against_real"]}
    columns |= held_out
    lines = [["", *columns]]
    for key, title, form in ROWS:
        if any(key in column for column in columns.values()):
            lines.append([title, *(form.format(c[key]) if c.get(key) is not None else "-" for c in columns.values())])
    return "\n".join([*aligned(lines), "", *class_table(scores | held_out)])


def tokenizer_line(scores: dict[str, Any], classifier: dict[str, Any]) -> str:
    """Return one line on what the generators build on: the tokenizer and the digit classifier."""
    return (f"tokenizer on held-out digits: FD {scores['fd']:.2f}, PSNR {scores['psnr']:.2f} dB, "
            f"SSIM {scores['ssim']:.3f}, {scores['codes_used']:.0%} of the codes in use; "
            f"digit classifier: {classifier['accuracy']:.1%} of held-out real digits")


def picture_list(paths: list[Path]) -> str:
    """Return the pictures' paths, a line each; a missing one is left out."""
    return "\n".join(f"  {path}" for path in paths if path.is_file())
