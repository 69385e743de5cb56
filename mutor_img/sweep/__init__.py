"""Scores over guidance scales and temperatures, from one checkpoint, with few samples a point."""
