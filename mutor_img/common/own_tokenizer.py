"""Importing this module makes sure that ``tokenizer`` is this project's, and says in one line what stands before it.

A user's script, or ``python -m`` in a user's folder, finds a package ``tokenizer`` of that folder first.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

OURS = Path(__file__).resolve().parents[2] / "tokenizer"


def mistake() -> str | None:
    """Say which other package is imported as ``tokenizer``; None: ours is."""
    try:
        spec = find_spec("tokenizer")
    except ValueError:  # a module made by hand
        spec = None
    found = (spec.submodule_search_locations or [spec.origin]) if spec else ["nowhere"]
    if any(path and os.path.realpath(path) == str(OURS) for path in found):
        return None
    return (f"the package tokenizer is found at {found[0]}, before mutor_img's own at {OURS}; run from another folder, "
            "or rename the one that is not mutor_img's")


def _is_command() -> bool:
    """Tell whether a ``python -m mutor_img...`` is being started; until its module is found, its name is "-m"."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return sys.argv[:1] == ["-m"] or (spec is not None and spec.name.startswith("mutor_img"))


if wrong := mistake():
    if _is_command():
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(wrong, name="tokenizer")
