"""A generator's training run: its config, task and command, and what is checked and planned before it."""
