"""How long OpenMP's threads spin at a barrier before they sleep.

A thread that spins eats the core that the last thread of its team may need: beside any other work the default (some
milliseconds) can make a step several times slower, while threads that never spin wake too late on an idle machine. A
short spin is as fast as the default on an idle machine and keeps most of that speed on a busy one
(docs/results.md has the figures). OpenMP reads the setting once, when torch is loaded.
"""

from __future__ import annotations

import os

SHORT = {
    "GOMP_SPINCOUNT": "1000",  # GNU's libgomp, which torch's wheels for Linux bring: turns of its waiting loop
    "KMP_BLOCKTIME": "1",  # LLVM's and Intel's runtimes: milliseconds
}
CHOICES = ("OMP_WAIT_POLICY", *SHORT)  # any of them set by the user is the user's choice of all


def spin_briefly() -> None:
    """Set a short spin for this process and its children, unless the environment says something about it.

    For commands only, before torch is loaded: importing the packages changes no environment.
    """
    if not any(name in os.environ for name in CHOICES):
        os.environ.update(SHORT)
