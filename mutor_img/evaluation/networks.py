"""The flags of every command that scores: which feature network, and where it runs."""

from __future__ import annotations

import argparse

import torch

from mutor_img.common.cli import Parser
from mutor_img.common.errors import UserError, check_range
from mutor_img.metrics.digits import DEFAULT_FOLDER
from mutor_img.metrics.features import FeatureNetwork
from mutor_img.metrics.networks import FEATURES, PREFIX, check_features, load_features
from mutor_img.training.runtime import Runtime


def add_network_flags(parser: Parser) -> None:
    """Add ``--features`` and what belongs to it, ``--batch-size`` and ``--device``."""
    add = parser.add_argument
    add("--features", default="inception", metavar="NAME",
        help=f"feature network: {', '.join(FEATURES)}, or {PREFIX}NAME for a timm model")
    add("--features-weights", metavar="PATH", help=f"folder of the classifier (default of mnist: {DEFAULT_FOLDER}), "
                                                   "or weights file of the timm model")
    add("--inception-weights", metavar="FILE", help="file of the Inception weights, if not in torch's hub folder")
    add("--batch-size", type=int, default=64, help="images at a time in each process")
    add("--device", help="cpu, cuda or cuda:N (default: CUDA if available, else the CPU)")


def check_network_flags(args: argparse.Namespace) -> None:
    """Raise :class:`UserError` for what cannot be meant."""
    if args.features == "inception" and args.features_weights:
        raise UserError("--features-weights is for --features mnist, classifier and timm:NAME; Inception's file is "
                        "given by --inception-weights")
    if args.features != "inception" and args.inception_weights:
        raise UserError(f"--inception-weights has no use with --features {args.features}")
    check_features(args.features, args.features_weights)
    check_range("--batch-size", args.batch_size, 1, 100_000)


def network_files(args: argparse.Namespace) -> dict[str, str | None]:
    """Return the paths of the network's weights, by flag."""
    weights = args.features_weights or (str(DEFAULT_FOLDER) if args.features == "mnist" else None)
    return {"--features-weights": weights, "--inception-weights": args.inception_weights}


def load_network(args: argparse.Namespace, runtime: Runtime) -> FeatureNetwork:
    """Load the network of the flags on this process's device, the main process first where it may have to download.

    Raises:
        UserError: as the loader of that network.
    """
    with runtime.main_first():
        return load_features(args.features, args.features_weights or args.inception_weights, runtime.device)


def start(name: str | None) -> Runtime:
    """Join the launch, if there is one, on ``--device``.

    Raises:
        UserError: no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {name!r} is not a device; give cpu, cuda or cuda:N") from None
    devices = {"cpu": 1, "cuda": torch.cuda.device_count()}
    if (device.index or 0) >= devices.get(device.type, 0):
        raise UserError(f"--device {name}: there is no such device here ({torch.cuda.device_count()} CUDA devices); "
                        "give another or leave it out")
    launched = Runtime.start()
    if launched.world == 1:
        return Runtime(device)
    if name is not None and (device.index is not None or device.type != launched.device.type):
        raise UserError(f"--device {name}: the {launched.world} processes use {launched.device.type}, one device "
                        "each; leave it out, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to score on CPUs")
    return launched
