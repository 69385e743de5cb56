"""A checkpoint as a repository on the Hugging Face Hub: its weights file for file, its tokenizer, and a model card.

The files of the weights are not written anew. So their sha256 is that of the run, and codes and samples that name it
name the published weights too. Nothing is a pickle.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mutor_img.checkpoints.card import write_card
from mutor_img.checkpoints.folder import codes_of, find_checkpoint, read_meta, read_tensors
from mutor_img.checkpoints.tensor_files import group_files, group_hash, sampled_group
from mutor_img.common.errors import UserError
from mutor_img.common.files import file_hash, filling, json_text, sealed
from mutor_img.common.hub import PACKED, hub_errors, import_hub, is_hub_name, pinned, repository_of
from mutor_img.common.outputs import keep_apart
from mutor_img.transformer import sampled_weights

Published = dict[str, Path | bytes]  # by its path in the repository, a file or its content


def push_to_hub(path: str | Path, repo: str, *, tokenizer: str | Path | None = None,
                scores: Sequence[str | Path] = (), licence: str | None = None, private: bool | None = None) -> str:
    """Publish a generator or a tokenizer with its model card, in one commit; returns its Hub name with that commit.

    Args:
        path: run folder or checkpoint folder; averaged weights are published where there are any.
        repo: ``org/name``, with or without ``hf://``; made where it does not exist.
        tokenizer: of a generator, where it is not where the run says: a path, or its own name on the Hub
            (``hf://org/name``). A folder is packed with the generator; a Hub name is noted. A ``.pt`` file is neither:
            whoever samples must then give it.
        scores: JSON files of ``evaluate_fid.py`` or ``tokenizer.reconstruct`` for the card, beside those of these
            weights that lie in the run folder.
        licence: its identifier on the Hub, such as "mit"; None: the card has a place to fill it in.
        private: whether a new repository is private; None: as the organisation has it.

    Raises:
        UserError: no checkpoint there, a file of it is damaged, the tokenizer is not the one that made the codes,
            scores are of other weights, the package huggingface_hub is missing, or the Hub refuses.
    """
    repo = repository_of(repo)
    told = f"hf://{repo}"
    hub = import_hub(told)
    files = repository(path, repo, tokenizer=tokenizer, scores=scores, licence=licence)
    with hub_errors(told):
        api = hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        added = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
                 for name, content in files.items()]
        return f"{told}@{api.create_commit(repo, added, commit_message='Upload a checkpoint of mutor_img').oid}"


def save_pretrained(path: str | Path, folder: str | Path, *, repo: str = "org/name", **options: Any) -> Path:
    """Write what :func:`push_to_hub` would publish into a new folder, to look at it first; returns the folder.

    Args:
        path, repo, options: as there; the card says how to load ``repo``.
        folder: must not exist.

    Raises:
        UserError: as there, or the folder exists.
    """
    folder = Path(folder)
    keep_apart({"folder": folder}, {"path": path})
    if folder.exists():
        raise UserError(f"{folder} exists already; give another folder or remove it")
    with filling(folder) as aside:
        for name, content in repository(path, repository_of(repo), **options).items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, aside / name)
            else:
                (aside / name).write_bytes(content)
    return folder


def unchanged_origin(model: nn.Module) -> Path:
    """Return the checkpoint folder that a model was read from, whose weights it still has.

    Raises:
        UserError: it was not read from one, or its weights are not those that would be published.
    """
    fix = "give the folder of a run: mutor_img.push_to_hub(folder, repo), or save_pretrained"
    if model.origin is None:
        raise UserError(f"this model was not read from a checkpoint of this project; {fix}")
    kept = sampled_weights(read_tensors(model.origin, sampled_group(read_meta(model.origin)["files"])))
    own = model.state_dict()
    if kept.keys() != own.keys() or not all(torch.equal(own[name].cpu(), kept[name]) for name in kept):
        raise UserError(f"{model.origin}: this model's weights are not those that it publishes; {fix}")
    return model.origin


def repository(path: str | Path, repo: str, *, tokenizer: str | Path | None = None,
               scores: Sequence[str | Path] = (), licence: str | None = None) -> Published:
    """Return the files of a repository by their paths in it; arguments and errors as :func:`push_to_hub`."""
    folder = find_checkpoint(path)
    meta, files = _checkpoint(folder)
    codes = codes_of(folder, meta)
    named = tokenizer or codes.get("tokenizer")
    packed: Published = {}
    if meta["kind"] == "generator" and named:
        recorded, found, packed = _tokenizer(named, codes.get("tokenizer_hash"))
        meta["codes"] = {**codes, "tokenizer": recorded, "tokenizer_hash": found}
    card, picture = write_card(repo, folder, meta, scores, licence, packed=bool(packed))
    return {"checkpoint.json": json_text(sealed(meta)), **files,
            **{f"{PACKED}/{name}": file for name, file in packed.items()}, "README.md": card.encode(), **picture}


def _checkpoint(folder: Path) -> tuple[dict[str, Any], Published]:
    """Return a checkpoint's JSON as far as sampling needs it, and its files of weights, which are read and checked."""
    meta = read_meta(folder)
    group = sampled_group(meta["files"])
    read_tensors(folder, group)  # a damaged file must not be published
    names = group_files(meta["files"], group)
    return {**meta, "files": {name: meta["files"][name] for name in names}}, {name: folder / name for name in names}


def _tokenizer(named: str | Path, expected: str | None) -> tuple[str, str, Published]:
    """Return what a generator's JSON calls its tokenizer, its sha256, and the files that are packed with it.

    Raises:
        UserError: it is not there, or not the one with the sha256 ``expected``; None, of converted weights: any is.
    """
    if not is_hub_name(named) and not Path(named).exists():
        raise UserError(f"{named}: no such file or folder; give tokenizer=, the path of the run's tokenizer or its "
                        "name on the Hub")
    if Path(named).is_file():
        recorded, found, files = Path(named).name, file_hash(named), {}
    else:
        named = pinned(named) if is_hub_name(named) else str(named)
        meta, files = _checkpoint(find_checkpoint(named))
        recorded, found = named, group_hash(meta["files"], sampled_group(meta["files"]))
    if expected is not None and found != expected:
        raise UserError(f"{named}: its weights have sha256 {found[:16]}, but the run's codes were made by a tokenizer "
                        f"with {expected[:16]}; give tokenizer=, that one's path or name on the Hub")
    if is_hub_name(recorded) or not files:
        return recorded, found, {}
    return PACKED, found, {"checkpoint.json": json_text(sealed(meta)), **files}
