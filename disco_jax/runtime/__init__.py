"""Running a plan on several hosts."""

from disco_jax.runtime.launch import connect, connected
from disco_jax.runtime.peers import Peers

__all__ = ["Peers", "connect", "connected"]
