"""What a file is that is not what was asked for: told by its first bytes, so that a message can name it."""

from __future__ import annotations

import os

PICKLE = "a pickle, which could run code and is not read"
_BEGINNINGS = {
    b"\x93NUMPY": "a single array (.npy)", b"\x89HDF": "an HDF5 file", b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a gzip archive", b"BZh": "a bzip2 archive", b"\xfd7zXZ": "an xz archive",
    b"7z\xbc\xaf": "a 7z archive", b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image",
    b"<!": "a web page", b"<html": "a web page", b"{": "a JSON text", b"[": "a JSON text",
    b"version https://git-lfs": "a pointer of Git LFS; git lfs pull fetches the file",
}


def kind_of(path: str | os.PathLike) -> str | None:
    """Say what a file is by its first bytes, or a pickle by its ending; None: a zip, or nothing known."""
    with open(path, "rb") as file:
        start = file.read(265)
    if not start:
        return "an empty file"
    if start[:1] == b"\x80" and start[1:2] in b"\1\2\3\4\5":
        return PICKLE
    if start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < os.path.getsize(path):
        return "a safetensors file"
    if start[257:262] == b"ustar":
        return "a tar archive"
    known = next((kind for begin, kind in _BEGINNINGS.items() if start.startswith(begin)), None)
    if known is None and not start.startswith(b"PK") and str(path).endswith((".pkl", ".pickle")):
        return PICKLE  # of the first protocol, which is text
    return "a text file" if known is None and _is_text(start) else known


def _is_text(start: bytes) -> bool:
    """Tell whether bytes are printable text; a character may be cut off at their end."""
    text = start.decode(errors="ignore")
    lost = len(start) - len(text.encode())
    return lost < 4 and text.translate(str.maketrans("", "", "\t\n\r")).isprintable()
