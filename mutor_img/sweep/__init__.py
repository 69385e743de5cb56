"""Scores over guidance scales and temperatures, from one checkpoint, with few samples a point."""

from mutor_img.sweep.points import SweepPoint, best_point, sweep

__all__ = ["SweepPoint", "best_point", "sweep"]
