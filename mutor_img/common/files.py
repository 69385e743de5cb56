"""Files that are whole or absent: every write goes aside, is flushed to disk, and is then renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutor_img.common.errors import UserError


def write_atomic(path: str | os.PathLike, write: Callable[[Path], None]) -> Path:
    """Call ``write(aside)``, flush, and rename ``aside`` to ``path``; nothing is left behind on an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def write_json(path: str | os.PathLike, value: Any) -> Path:
    """Write JSON that a person can read, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return write_atomic(path, lambda aside: aside.write_text(text))


def read_json(path: str | os.PathLike) -> Any:
    """Read JSON.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def file_hash(path: str | os.PathLike) -> str:
    """Return the sha256 of a file as hexadecimal digits, reading in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
