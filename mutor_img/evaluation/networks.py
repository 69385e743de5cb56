"""The flags of every command that scores: which metrics and feature network, and where it runs."""

from __future__ import annotations

import argparse

from mutor_img.common.cli import Parser, parse_words
from mutor_img.common.errors import UserError, check_range
from mutor_img.metrics.digits import DEFAULT_FOLDER
from mutor_img.metrics.features import FeatureNetwork
from mutor_img.metrics.networks import FEATURES, PREFIX, check_features, load_features
from mutor_img.metrics.requirements import check_names
from mutor_img.training.runtime import DEVICES, Runtime


def add_network_flags(parser: Parser) -> None:
    """Add ``--features`` and what belongs to it, ``--batch-size`` and ``--device``."""
    add = parser.add_argument
    add("--features", default="inception", metavar="NAME",
        help=f"feature network: {', '.join(FEATURES)}, or {PREFIX}NAME for a timm model")
    add("--features-weights", metavar="PATH", help=f"folder of the classifier (default of mnist: {DEFAULT_FOLDER}), "
                                                   "or weights file of the timm model")
    add("--inception-weights", metavar="FILE", help="file of the Inception weights, if not in torch's hub folder")
    add("--batch-size", type=int, default=64, help="images at a time on each device")
    add("--device", default="auto", metavar="NAME", help=DEVICES)


def check_network_flags(args: argparse.Namespace) -> None:
    """Raise :class:`UserError` for what cannot be meant."""
    if args.features == "inception" and args.features_weights:
        raise UserError("--features-weights is for --features mnist, classifier and timm:NAME; Inception's file is "
                        "given by --inception-weights")
    if args.features != "inception" and args.inception_weights:
        raise UserError(f"--inception-weights has no use with --features {args.features}")
    check_features(args.features, args.features_weights)
    check_range("--batch-size", args.batch_size, 1, 100_000)


def parse_metrics(text: str | None) -> list[str] | None:
    """Return the metrics that ``--metrics`` names; None where it is not given.

    Raises:
        UserError: it is empty, or names one that does not exist.
    """
    if text is None:
        return None
    names = parse_words(text, "--metrics")
    check_names(names)
    return names


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
