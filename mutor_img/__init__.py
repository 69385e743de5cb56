"""Autoregressive image generation with multi-token prediction by registers (MuToR)."""

from mutor_img.registers import draw_registers, mutor_loss

__all__ = ["draw_registers", "mutor_loss"]
