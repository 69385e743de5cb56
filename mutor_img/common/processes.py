"""What the processes of one launch tell each other, as JSON: rank 0 looks and all know, or all compare and one speaks.

Each process sees a shared disk for itself, and over a network sometimes late. Where they look one by one, some may
find a file that others miss: work is then done twice or not at all, or one process waits for ever in a collective that
the others never enter. So whatever decides what is done is looked up by rank 0 alone, and whatever has to be the same
everywhere is compared before it is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist

from mutor_img.common.errors import UserError
from mutor_img.common.files import remove, wait_until_seen

T = TypeVar("T")
SAME = "start every process with the same command, and let all of them see the same files"


def place() -> tuple[int, int]:
    """Return (rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def broadcast(value: Any, source: int = 0) -> Any:
    """Return on every process the JSON value that process ``source`` gave; all of them call this."""
    rank, world = place()
    if world == 1:
        return value
    device = _device()
    sent = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if rank == source else None
    size = torch.tensor([0 if sent is None else len(sent)], device=device)
    dist.broadcast(size, source)
    text = torch.empty(int(size), dtype=torch.uint8, device=device) if sent is None else sent.to(device)
    dist.broadcast(text, source)
    return json.loads(bytes(text.tolist()))


def from_main(look: Callable[[], T]) -> T:
    """Return on every process what ``look()`` gives on rank 0, a JSON value; the others do not look.

    Raises:
        UserError, OSError: rank 0 met it; then every process raises it.
    """
    rank, world = place()
    if world == 1:
        return look()
    told, met = {}, None
    if rank == 0:
        try:
            told = {"value": look()}
        except Exception as error:
            met, told = error, _as_json(error)
    told = broadcast(told)
    if met is not None:
        raise met
    if "mistake" in told:
        raise UserError(told["mistake"])
    if "system" in told:
        raise OSError(*told["system"])
    if "failure" in told:  # rank 0 says what it was
        raise SystemExit(1)
    return told["value"]


def share_mistake(mistake: str | None) -> None:
    """Raise on every process, as a :class:`UserError`, what one of them met: the others would wait for it for ever.

    Args:
        mistake: this process's, or None. Of several the lowest rank's counts.
    """
    rank, world = place()
    if world == 1:
        if mistake is not None:
            raise UserError(mistake)
        return
    first = torch.tensor([world if mistake is None else rank], device=_device())
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    if int(first) < world:
        raise UserError(broadcast(mistake, int(first)))


def agree(values: Mapping[str, Any], fix: str = SAME) -> None:
    """Check that all processes were given the same values; every process calls this before it relies on them.

    Args:
        values: JSON values by name; sections may hold sections.
        fix: what the user can do.

    Raises:
        UserError: on every process; it names the first value that differs, and a rank where it does.
    """
    rank, world = place()
    if world == 1:
        return
    mine, others = dict(leaves(json.loads(json.dumps(values)))), dict(leaves(broadcast(values)))
    name = next((name for name in {**others, **mine} if mine.get(name) != others.get(name)), None)
    share_mistake(None if name is None else f"{name} is {_short(mine.get(name))} on rank {rank}, but "
                                            f"{_short(others.get(name))} on rank 0; {fix}")


def check_shared(folder: str | os.PathLike, name: str) -> None:
    """Check that all processes see one folder, before work begins that they are to write there; all call this.

    Args:
        folder: rank 0 makes it where it is not there.
        name: the setting that says where it is.

    Raises:
        UserError: on every process; one of them does not see what rank 0 wrote.
    """
    if place()[1] == 1:
        return
    mark, mistake = Path(folder) / from_main(lambda: _mark(folder)), None
    try:
        wait_until_seen(lambda: None if mark.is_file() else mark, name)
    except UserError as error:
        mistake = str(error)
    try:
        share_mistake(mistake)
    finally:
        if place()[0] == 0:
            remove(mark)


def _mark(folder: str | os.PathLike) -> str:
    """Write an empty file under a name that nobody has asked for before; returns the name."""
    mark = Path(folder) / f".seen_{uuid4().hex}.part"
    mark.parent.mkdir(parents=True, exist_ok=True)
    for left in mark.parent.glob(".seen_*.part"):  # by a kill
        remove(left)
    mark.touch()
    return mark.name


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name of every value in sections of sections, and the value as JSON gives it back."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def _device() -> torch.device:
    """Return where collectives want their tensors."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _as_json(error: Exception) -> dict[str, Any]:
    if isinstance(error, UserError):
        return {"mistake": str(error)}
    if isinstance(error, OSError) and error.errno is not None:
        return {"system": [error.errno, error.strerror, None if error.filename is None else str(error.filename)]}
    return {"failure": True}


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 200 else f"{text[:100]} … {text[-97:]}"
