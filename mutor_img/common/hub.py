"""Models on the Hugging Face Hub: what ``hf://org/name[@revision]`` means, wherever a checkpoint or tokenizer is named.

A name stands for a folder in the Hub's cache, filled when it is first asked for. Only the files of a checkpoint are
fetched, and of them only those that its JSON lists. What is in the cache needs no network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self

from mutor_img.common.errors import UserError, first_line
from mutor_img.common.files import read_json

MAJOR = 2  # of huggingface_hub, as in pyproject.toml
FORM = "hf://org/name, or hf://org/name@revision"
PACKED = "tokenizer"  # folder of a generator's repository that holds its tokenizer
_NAME = re.compile(r"hf://((?!\.)[\w.-]+/(?!\.)[\w.-]+)(?:@([^\s@]+))?")


def is_hub_name(path: str | Path) -> bool:
    """Tell whether a path is meant as a name on the Hub."""
    return str(path).startswith("hf:")


def as_typed(name: str | Path) -> str:
    """Return a name with its two slashes, of which a ``Path`` makes one."""
    return re.sub("^hf:/+", "hf://", str(name))


def hub_folder(name: str | Path) -> Path:
    """Return the folder of a Hub name in the local cache, after fetching what is missing there.

    The folder is called as its commit is. The hashes of the weights are checked where they are read, as for any other
    checkpoint.

    Args:
        name: ``hf://org/name``, with a branch, tag or commit after an ``@`` where the default branch is not meant.

    Raises:
        UserError: another form; the package huggingface_hub is missing; no such repository or revision, or none that
            this user may read; no checkpoint of ours in it; or nothing in the cache and no way to the Hub.
    """
    repo, revision = _parse(name)
    told = f"hf://{repo}" + f"@{revision}" * bool(revision)
    hub = import_hub(told)
    packed = f"{PACKED}/checkpoint.json"
    with hub_errors(told):
        folder = _fetch(hub, repo, revision, ["checkpoint.json", packed])
        if not (folder / "checkpoint.json").is_file():
            raise UserError(f"{told}: has no checkpoint.json, so it is not a model of this project; of other files, "
                            "such as LlamaGen's .pt, download the one that you need and give its path")
        wanted = [*_files_of(folder, ""), *_files_of(folder, f"{PACKED}/")]
        return _fetch(hub, repo, folder.name, ["checkpoint.json", packed, *wanted])  # of the same commit


def pinned(name: str | Path) -> str:
    """Return a Hub name with its commit in place of a branch or tag, which may move; fetches as :func:`hub_folder`."""
    return f"hf://{_parse(name)[0]}@{hub_folder(name).name}"


def hub_path(name: str | Path, revision: str | None = None) -> str:
    """Return what ``from_pretrained(name)`` means: a path that exists as it is, else the Hub name of ``org/name``.

    Raises:
        UserError: a path where nothing is, of a form that no repository has; or a revision of what is no ``org/name``.
    """
    if is_hub_name(name) or Path(name).exists():
        if revision is not None:
            raise UserError(f"{name}: revision={revision} is for a name on the Hub, as in org/name; give that alone")
        return str(name)
    if not _NAME.fullmatch(f"hf://{name}"):
        raise UserError(f"{name}: no such file or folder, and not the name of a model on the Hub, as in org/name; "
                        "check the path")
    return f"hf://{name}" + f"@{revision}" * (revision is not None)


def repository_of(name: str) -> str:
    """Return the ``org/name`` that is published to; ``hf://`` may stand before it.

    Raises:
        UserError: another form, or a revision.
    """
    repo, revision = _parse(name if is_hub_name(name) else f"hf://{name}")
    if revision is not None:
        raise UserError(f"{name}: is published to the default branch; leave @{revision} out")
    return repo


def _parse(name: str | Path) -> tuple[str, str | None]:
    """Return repository and revision (None: the default branch) of a Hub name."""
    found = _NAME.fullmatch(as_typed(name))
    if found is None:
        raise UserError(f"{as_typed(name)}: not the name of a model on the Hub; give {FORM}")
    return found[1], found[2]


def _fetch(hub: ModuleType, repo: str, revision: str | None, files: list[str]) -> Path:
    """Return the folder of a commit once these files are there; what is cached of a known commit is not asked for."""
    options = {"revision": revision, "allow_patterns": files}
    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        with suppress(hub.errors.CachedRepoTreeNotFoundError, hub.errors.LocalEntryNotFoundError):
            hub.get_cached_repo_tree(repo, revision=revision)  # else nobody can tell whether all are there
            return Path(hub.snapshot_download(repo, local_files_only=True, **options))
    return Path(hub.snapshot_download(repo, **options))


def _files_of(folder: Path, below: str) -> list[str]:
    """Return the files that the checkpoint.json in ``below`` lists, by their paths in the repository; [] without it."""
    path = folder / below / "checkpoint.json"
    content = read_json(path) if path.is_file() else None
    listed = content.get("files") if isinstance(content, dict) else None
    return [below + name for name in listed] if isinstance(listed, dict) else []  # its reader refuses another format


def import_hub(what: str) -> ModuleType:
    """Import huggingface_hub for ``what``, which an error names.

    Raises:
        UserError: it is not installed, or in a version with other errors.
    """
    fix = "pip install 'mutor_img[hub]'"
    try:
        found = version("huggingface_hub")
        if int(found.split(".")[0]) != MAJOR:
            raise UserError(f"{what}: needs huggingface_hub {MAJOR}, and {found} is installed; {fix}")
        return import_module("huggingface_hub")
    except ImportError as error:  # PackageNotFoundError is one
        raise UserError(f"{what}: needs the package huggingface_hub ({error}); {fix}") from None


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Say in one line what went wrong with the Hub, inside this context; ``what`` is the name that was given.

    Raises:
        UserError: in place of the errors of huggingface_hub and of its connections.
    """
    from huggingface_hub import constants, errors

    login = "log in with: hf auth login"
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"{what}: gated; ask for access on its page, then {login}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{what}: no such repository at {constants.ENDPOINT}, or a private one; check the name, or "
                        f"{login}") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{what}: no such revision in this repository; give a branch, tag or commit that it "
                        "has") from None
    except errors.HFValidationError as error:
        raise UserError(f"{what}: not the name of a model on the Hub ({_first_line(error)}); give {FORM}") from None
    except errors.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{constants.ENDPOINT} cannot be reached"
        raise UserError(f"{what}: not complete in the cache {constants.HF_HUB_CACHE}, and {why}; run the command once "
                        "where there is a network, or copy the cache from there") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        fix = login if status in (401, 403) else "try again later"
        raise UserError(f"{what}: {constants.ENDPOINT} answered {status} ({_first_line(error)}); {fix}") from None
    except (errors.HTTPError, errors.OfflineModeIsEnabled, errors.XetDownloadError, errors.FileMetadataError) as error:
        raise UserError(f"{what}: no connection to {constants.ENDPOINT} ({_first_line(error)}); check the network, "
                        "then run the same again") from None


def _first_line(error: Exception) -> str:
    return first_line(error).rstrip(".")


class HubModel:
    """What the models of this project have for the Hub: ``from_pretrained``, ``push_to_hub`` and ``save_pretrained``.

    What loads and publishes is in layers above this one, so it is imported by name.

    Attributes:
        loader: module and function that load such a model.
        origin: the checkpoint folder that its weights were read from; None: they were not read from one.
    """

    loader: ClassVar[tuple[str, str]]
    origin: Path | None = None

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, **options: Any) -> Self:
        """Return a model from the Hub (``org/name``), ready for use, or from a path as its loader takes it.

        Args:
            name: what exists as a path is one.
            revision: branch, tag or commit on the Hub; None: the default branch.
            options: those of the loader.

        Raises:
            UserError: as :func:`hub_folder` and the loader.
        """
        module, function = cls.loader
        return getattr(import_module(module), function)(hub_path(name, revision), **options)

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Publish the checkpoint that this model was read from; arguments as ``mutor_img.push_to_hub`` after its path.

        Raises:
            UserError: it was not read from one, its weights have changed since, or as there.
        """
        publishing = import_module("mutor_img.checkpoints.publishing")
        return publishing.push_to_hub(publishing.unchanged_origin(self), repo, **options)

    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:
        """Write what :meth:`push_to_hub` would publish into a new folder, which ``from_pretrained`` takes; returns it.

        Raises:
            UserError: as there, or the folder exists.
        """
        publishing = import_module("mutor_img.checkpoints.publishing")
        return publishing.save_pretrained(publishing.unchanged_origin(self), folder, **options)
