"""Autoregressive image generation with multi-token prediction by registers (MuToR)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mutor_img.checkpoints.loading import load_checkpoint
    from mutor_img.checkpoints.publishing import push_to_hub, save_pretrained
    from mutor_img.decoding.sampler import generate
    from mutor_img.registers import draw_registers, mutor_loss
    from mutor_img.transformer import Transformer

__all__ = ["Transformer", "draw_registers", "generate", "load_checkpoint", "mutor_loss", "push_to_hub",
           "save_pretrained"]

_HOMES = {"draw_registers": "registers", "mutor_loss": "registers", "generate": "decoding.sampler",
          "load_checkpoint": "checkpoints.loading", "Transformer": "transformer",
          "push_to_hub": "checkpoints.publishing", "save_pretrained": "checkpoints.publishing"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: a command sets the environment before torch is loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
