"""Scores over guidance scales, schedules and temperatures, from one checkpoint, with few samples per point."""
