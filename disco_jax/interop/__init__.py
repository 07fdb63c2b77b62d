"""Weights from and for other programs."""

from disco_jax.interop import pretrained

__all__ = ["pretrained"]
