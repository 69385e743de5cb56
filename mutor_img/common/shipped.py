"""The configs that come with the project: in a clone ``configs/``, in a wheel the same files as package data."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from mutor_img.common.errors import UserError

PACKAGED = Path(str(files("mutor_img"))) / "configs"  # in a clone, and where it is installed editable, a link
_ENDINGS = (".yaml", ".yml")


def find_config(given: str | Path) -> Path:
    """Return the file that ``--config`` or ``extends`` names.

    Args:
        given: a path, with or without its ``.yaml``; or a shipped config's, as in ``imagenet256/mutor2d_b_80`` or
            ``configs/imagenet256/mutor2d_b_80.yaml``. The current folder's ``configs/`` comes before the package's.

    Raises:
        UserError: there is no such file; the nearest names that there are stand in the message.
    """
    path = Path(given)
    whole = path.suffix in _ENDINGS or not path.name  # "." has no name to add an ending to
    names = [path] if whole else [path, path.with_name(path.name + _ENDINGS[0])]
    places = [Path(), *(() if path.is_absolute() else (Path("configs"), PACKAGED))]
    for place in places:
        for name in names:
            if place != Path() and name.parts[:1] == ("configs",):
                name = name.relative_to("configs")
            if (place / name).is_file():
                return place / name
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a config file; give --config the path of a YAML file")
    raise UserError(f"{path}: no such config file; give --config the path of a YAML file, or the name of one that is "
                    f"shipped{_nearest(path)}")


def shipped_names() -> list[str]:
    """Return the names of all shipped configs, as in ``mnist/mutor2d``."""
    return sorted(path.relative_to(PACKAGED).with_suffix("").as_posix() for path in PACKAGED.glob("*/*.yaml"))


def _nearest(path: Path) -> str:
    word = path.with_suffix("").as_posix().removeprefix("configs/") if path.suffix in _ENDINGS else path.as_posix()
    known = shipped_names()
    by_file = {name: name.split("/")[-1] for name in known}
    found = difflib.get_close_matches(word, known, 3, 0.6) or [
        name for name in known if by_file[name] in difflib.get_close_matches(word, by_file.values(), 3, 0.6)]
    return f"; the nearest: {', '.join(found)}" if found else f": {', '.join(known)}"
