"""How long OpenMP's threads spin at a barrier before they sleep.

A thread that spins uses the core that the last thread of its team may need. So beside other work spinning can make a
step several times slower. On an idle machine sleeping costs speed instead, where waking a thread is slow: on a virtual
machine up to two thirds. So each command looks whether its processors are in use before it decides
(docs/results.md has the figures). OpenMP reads the setting once, when torch is loaded.
"""

from __future__ import annotations

import os
import sys

# Turns of the waiting loop of GNU's libgomp, which torch's wheels for Linux bring; milliseconds for LLVM's and Intel's.
NEVER = {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
LONG = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}  # the runtimes' own defaults
CHOICES = ("OMP_WAIT_POLICY", *NEVER)  # any of them set by the user is the user's choice of all
OURS = "MUTOR_IMG_SPINNING"  # marks a setting made here: a child that is a command looks anew
_LOOK = 0.1  # seconds


def set_spinning() -> None:
    """Let no thread spin if other work uses the processors, else long, for this process and its children.

    What the user has set in the environment stays. For commands only, before torch is loaded: importing mutor_img or
    tokenizer changes no environment. Nor does a command that prints its help, or that has one thread, which waits for
    no other.
    """
    chosen = OURS not in os.environ and any(name in os.environ for name in CHOICES)
    if not chosen and not {"-h", "--help"} & set(sys.argv) and _threads() != "1":
        os.environ.update(NEVER if in_use() else LONG, **{OURS: "1"})


def _threads() -> str:
    """Return how many threads OpenMP's outermost teams will have."""
    return os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip() or str(len(_processors()))


def share(jobs: int) -> dict[str, str]:
    """Return what gives each of ``jobs`` processes side by side its share of the threads; for one alone nothing.

    That is of OpenMP's threads and of the compiler's processes.
    """
    count = str(max(1, len(_processors()) // jobs))
    return dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), count) if jobs > 1 else {}


def _processors() -> set[int]:
    """Return the numbers of the processors that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def in_use() -> bool:
    """Return whether more than half a processor of those that this process may use was busy in the last moment."""
    import psutil

    shares = psutil.cpu_percent(_LOOK, percpu=True)  # this process sleeps meanwhile
    return sum(shares[cpu] for cpu in _processors() if cpu < len(shares)) > 50
