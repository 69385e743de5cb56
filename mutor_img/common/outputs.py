"""What a command writes must not be what it reads: compared before anything is opened, whatever the paths look like."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from mutor_img.common.errors import UserError
from mutor_img.common.hub import as_typed, is_hub_name

Paths = str | os.PathLike | None | Sequence[str | os.PathLike]
# Folders of the project's own formats: what is not among these names may be written beside them.
_STORE = {"codes.npy", "labels.npy", "codes.json", "encode.json", "parts"}
_RUN = {"checkpoints", "config.yaml"}
RUN_SIGNS = {*_RUN, "metrics.jsonl"}
STRAY = {".log", ".out", ".err", ".txt"}  # what launchers and shells write to a run's folder before the run is there


def keep_apart(outputs: Mapping[str, Paths], inputs: Mapping[str, Paths], removed: Mapping[str, Paths] | None = None,
               ) -> None:
    """Compare what a command writes with what it reads, and its outputs with each other.

    An output may neither be an input (under this name, through a link, or a second name of the same file) nor lie in
    a folder that is read. A run folder and a code store may be given further files, but not those that they are made
    of. Nothing needs to exist, and nothing is opened.

    Args:
        outputs: path or paths by what a message calls them (``"--out"``); several paths of one flag may lie in each
            other.
        inputs: likewise; None is no path.
        removed: folders of the outputs that are emptied on the way; no input and no other output may lie in them.

    Raises:
        UserError: naming both, and what to do; or an output is a name on the Hub.
    """
    removed = removed or {}
    written = [*_each(outputs), *_each(removed)]
    for flag, out in written:
        if is_hub_name(out):
            raise UserError(f"{flag} {as_typed(out)}: a name on the Hugging Face Hub, from which commands only read; "
                            "give a path")
    for source, path in _each(inputs):
        _check_input(source, path, written)
    for flag, folder in _each(removed):
        for source, path in [*_each(inputs), *_each(outputs)]:
            if source != flag and _within(path, folder):
                raise UserError(f"{source} {path} lies in {folder}, which {flag} fills and removes; give another path")
    for flag, out in written:
        for other, path in _each(outputs):
            if other != flag and _same(out, path):
                raise UserError(f"{flag} and {other} are both {out}; give two paths")
            if other != flag and _within(out, path):
                raise UserError(f"{flag} {out} lies in {path}, which is that of {other}; give a path outside of it")


def keep_unseen(held_out: str, path: str | Path, flag: str, seen: str | Path) -> None:
    """Raise :class:`UserError` where the images of ``held_out`` are those of ``flag``, under whatever name."""
    if _same(Path(path), Path(seen)):
        raise UserError(f"{held_out} and {flag} are both {path}, but held-out images must not be among those; give "
                        f"{held_out} another folder")


def refuse_strange_folder(flag: str, folder: str | Path, signs: Collection[str], kind: str) -> None:
    """Raise :class:`UserError` for a folder that holds other things and nothing of what is to be written into it.

    Text that launchers and shells leave beside a run (:data:`STRAY`) is nothing to refuse it for.

    Args:
        flag: what the message calls it.
        folder: need not exist.
        signs: names of which one at least is there if the folder was filled before.
        kind: what the folder is for, as in ``"run"``.
    """
    folder = Path(folder)
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    strange = [name for name in names if Path(name).suffix not in STRAY]
    if strange and not set(signs) & set(names):
        others = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise UserError(f"{flag} {folder} holds no {kind} but {strange[0]}{others}; give a folder of its own")


def _check_input(source: str, path: Path, written: Sequence[tuple[str, Path]]) -> None:
    """Raise :class:`UserError` for an output that is this input or lies in it; its links are followed once for all."""
    taken: dict[Path, str] = {}  # the outputs' places, and all folders above them
    for flag, out in written:
        if _same(out, path):
            raise UserError(f"{flag} {out} is {source}{f' {path}' if path != out else ''} itself, which would be "
                            "overwritten; give another path")
        if path.is_dir() and not _is_free(path, out):
            taken = {above: f"{flag} {out}" for place in _places(out) for above in (place, *place.parents)} | taken
    if not taken:
        return
    for folder in (Path(os.path.realpath(path)), *_links(path)):
        if folder in taken:
            raise UserError(f"{taken[folder]} lies in {source} {path}, which is read; give a path outside of it")


def _each(paths: Mapping[str, Paths]) -> Iterator[tuple[str, Path]]:
    for name, given in paths.items():
        for path in [given] if isinstance(given, (str, os.PathLike)) else given or ():
            yield name, Path(path)


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one is not there: two names of what is not there yet, perhaps
        return bool(_places(one) & _places(other))


def _within(path: Path, folder: Path) -> bool:
    """Tell whether a path lies below a folder, by its own name or by where a link of that name leads."""
    return any(Path(os.path.realpath(folder)) in place.parents for place in _places(path))


def _places(path: Path) -> set[Path]:
    """Return where a path leads, and where its own entry stands: writing replaces the entry, be it a link."""
    return {Path(os.path.realpath(path)), Path(os.path.realpath(path.parent)) / path.name}


def _is_free(folder: Path, out: Path) -> bool:
    """Tell whether a folder is of a format of ours in which this output stands beside the files that count."""
    names = _STORE if (folder / "codes.json").is_file() else _RUN if any(folder.glob("checkpoints/step_*")) else None
    if names is None:
        return False
    root = Path(os.path.realpath(folder))
    return not any(root in place.parents and place.relative_to(root).parts[0] in names for place in _places(out))


def _links(folder: Path) -> Iterator[Path]:
    """Yield where the links below a folder lead."""
    try:
        entries = list(os.scandir(folder))
    except PermissionError:  # nor is anything in it read, such as of a disk's lost+found
        return
    for entry in entries:
        if entry.is_symlink():
            yield Path(os.path.realpath(entry))
        elif entry.is_dir():
            yield from _links(Path(entry))
