"""The VQ tokenizer: train, encode, reconstruct and inspect, and the network itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizer.loading import load_tokenizer
    from tokenizer.network.vq import VQModel

__all__ = ["VQModel", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: a command sets the environment before torch is loaded."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tokenizer import loading

    return getattr(loading, name)
