"""Scores over guidance scales, schedules and temperatures, from one checkpoint, with few samples a point."""
