"""Write docs/licences.md: the licence of each package that the project needs, as the installed package names it.

    pip install '.[dev,app,test-app]' && python docs/write_licences.py
"""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from importlib.metadata import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path(__file__).with_name("licences.md")
HEAD = """# Licences

The project is under the MIT licence. These are the packages that it uses, with their licences in their own words. None
of them is part of this repository. `python docs/write_licences.py` writes this page.

Nearly all are permissive (MIT, BSD, Apache 2.0, PSF and the like). These are not, or not wholly:

- **certifi, tqdm**: Mozilla Public License 2.0. It asks whoever changes their files to publish the changed files.
- **torch for CUDA**: NVIDIA's libraries (the lines `nvidia-*` and `cuda-*` of `requirements.lock`) are under NVIDIA's
  own licences. They are not free software. The builds for CPUs do not have them.
- **The weights** that you fetch have licences of their own: those of Inception, of VGG16, and of each model on the Hub.
"""
_ELSEWHERE = re.compile("nvidia|cuda|triton")  # what builds for CPUs leave out


def direct() -> dict[str, list[str]]:
    """Return the packages that pyproject.toml names, and for which extras; no extra: always."""
    project, found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"], defaultdict(list)
    for extra, texts in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for name in (Requirement(text).name for text in texts):
            if canonicalize_name(name) != canonicalize_name(project["name"]):
                found[canonicalize_name(name)] += [extra] * bool(extra)
    return dict(sorted(found.items()))


def locked() -> list[str]:
    """Return the packages of requirements.lock that every build has."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    names = [canonicalize_name(line.partition("==")[0]) for line in lines if not line.startswith("#")]
    return [name for name in names if not _ELSEWHERE.match(name)]


def licence(name: str) -> str:
    """Return what an installed package calls its licence.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    about = metadata(name)
    classes = [text.rpartition(" :: ")[2] for text in about.get_all("Classifier") or [] if text.startswith("License :")]
    words = about.get("License", "UNKNOWN")  # of some packages the whole text
    free = words if "\n" not in words and len(words) < 60 and words != "UNKNOWN" else ""
    return about.get("License-Expression") or free or ", ".join(classes) or "not stated"


def rows() -> list[str]:
    """Return a table row for each package that pyproject.toml names.

    Raises:
        PackageNotFoundError: one is not installed.
    """
    return [f"| {name} | {licence(name)} | {', '.join(extras)} |" for name, extras in direct().items()]


def page() -> str:
    """Return the page's text."""
    others, known = defaultdict(list), direct()
    for name in locked():
        if name not in known:
            others[licence(name)].append(name)
    lines = [HEAD, "## Named by `pyproject.toml`\n", "| package | licence | only for the extras |", "|---|---|---|",
             *rows(), "\n## Needed by these, as in `requirements.lock`\n", "| licence | packages |", "|---|---|",
             *(f"| {words} | {', '.join(sorted(names))} |" for words, names in sorted(others.items()))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
