"""Autoregressive image generation with multi-token prediction by registers (MuToR)."""

from mutor_img.checkpoints.loading import load_checkpoint
from mutor_img.decoding.sampler import generate
from mutor_img.registers import draw_registers, mutor_loss

__all__ = ["draw_registers", "generate", "load_checkpoint", "mutor_loss"]
