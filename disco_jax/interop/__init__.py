"""Models and weights from other programs."""

from disco_jax.interop import linen, pretrained
from disco_jax.interop.distribute import distribute
from disco_jax.interop.distributed import Distributed, Report

__all__ = ["Distributed", "Report", "distribute", "linen", "pretrained"]
