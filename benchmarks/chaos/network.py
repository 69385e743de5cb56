"""No network: the commands run where there is none, and none of them tries to reach another machine.

Each trial leaves the network: its process gets a namespace of its own with no interface in it, where the system allows
that. An audit hook also notes what Python code asks of other machines, and refuses it. What has to be fetched, because
the user has named it, is missing in one line.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.chaos import inputs
from benchmarks.chaos.case import Case, Fault, Place, said_no
from benchmarks.chaos.numbers import GENERATOR, TOKENIZER
from mutor_img import blocks
from mutor_img.metrics.inception import INCEPTION_FILE

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # of unshare(2)


def leave_network() -> bool:
    """Give this process, which has one thread, a network without interfaces; returns whether the system allows it."""
    unshare = ctypes.CDLL(None).unshare
    return unshare(_NEW_NETWORK) == 0 or unshare(_NEW_USER | _NEW_NETWORK) == 0  # root, or whoever may be it in a space


def attempt(caches: str, commands: list[tuple[str, list[str]]]) -> dict[str, Any]:
    """Run commands, each a module and its arguments, without a network; runs in a fork.

    Returns:
        ``apart``: there was none, and ``tried``: addresses that Python code wanted to reach.
    """
    torch.set_num_threads(1)
    blocks.PRESETS["mnist"] = (1, 2, 16)
    os.environ |= {"TORCH_HOME": caches, "XDG_CACHE_HOME": caches}
    tried: list[str] = []
    found = {"apart": leave_network(), "tried": tried}
    sys.addaudithook(partial(_refuse, tried))
    for module, arguments in commands:
        import_module(module).main(arguments)
    return found


def _refuse(tried: list[str], event: str, details: tuple[Any, ...]) -> None:
    """Note and refuse what goes beyond this machine."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        target = details[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        target = details[:1]
    else:
        return
    if isinstance(target, tuple) and not _here(target[0]):
        tried.append(str(target))
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))


def _here(host: Any) -> bool:
    try:
        return host in (None, "", b"", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def cases(place: Place) -> Iterator[Case]:
    """Yield a case for the commands from images to scores, and one for each thing that is fetched if it is named."""
    folder = place.folder
    inputs.write_images(folder / "images", side=16)
    for name, text in (("generator", GENERATOR), ("tokenizer", TOKENIZER)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    classifier = inputs.write_classifier(folder / "classifier", side=16)

    def train(name: str) -> list[str]:
        return ["--config", f"{folder}/{name}.yaml", f"run_dir={folder}/{name}", "train.steps=2",
                "train.validate_every=2", "train.picture_every=2", "model.vocabulary=16"]

    samples, images = f"{folder}/samples.npz", ["--images", f"{folder}/images", "--workers", "0"]
    tokenizer, score = ["--tokenizer", f"{folder}/tokenizer"], ["--samples", samples, "--reference", f"{folder}/images"]
    commands = [("tokenizer.train", train("tokenizer")),
                ("tokenizer.reconstruct", [*tokenizer, *images, "--json", f"{folder}/reconstructed.json"]),
                ("tokenizer.encode", [*tokenizer, *images, "--out", f"{folder}/codes"]),
                ("mutor_img.pretraining.command", [*train("generator"), f"data.val_codes={folder}/codes"]),
                ("mutor_img.sampling.command", ["--checkpoint", f"{folder}/generator", "--num-samples", "24",
                                                "--device", "cpu", "--out", samples]),
                ("mutor_img.evaluation.command", [*score, "--features", "mnist", "--features-weights", str(classifier),
                                                  "--device", "cpu", "--json", f"{folder}/scores.json"])]
    yield Case("from images to scores", lambda: _nothing_tried(place, commands))
    yield Case("Inception's weights", lambda: _missing(place, INCEPTION_FILE, commands[-1][0],
                                                       [*score, "--device", "cpu"]))
    if find_spec("huggingface_hub"):
        yield Case("a model on the Hub", lambda: _missing(place, "hf://org/name", commands[-2][0], [
            "--checkpoint", "hf://org/name", "--out", samples + "2.npz"]))


def _nothing_tried(place: Place, commands: list[tuple[str, list[str]]]) -> str:
    answer = place.forks.run(f"{__name__}:attempt", str(place.folder / "caches"), commands)
    if answer["outcome"] != "returned":
        raise Fault(f"{answer['outcome']}: {answer['message']} {answer['printed'][-300:]}")
    found = json.loads(answer["message"])
    if found["tried"]:
        raise Fault(f"wanted to reach {found['tried']}")
    return "nothing tried" if found["apart"] else "nothing tried, but watched alone: no namespace is allowed here"


def _missing(place: Place, name: str, *command: Any) -> str:
    said_no(place.forks.run(f"{__name__}:attempt", str(place.folder / "caches"), [command]), name)
    return "missing in one line"
