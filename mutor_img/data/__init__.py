"""Codes on disk: the store, and the order in which training reads it."""
