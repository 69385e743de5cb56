"""Scores over guidance scales, schedules and temperatures, from one checkpoint, with few samples a point."""

from mutor_img.sweep.points import SweepPoint, best_point, grid, sweep

__all__ = ["SweepPoint", "best_point", "grid", "sweep"]
