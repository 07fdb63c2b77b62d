"""Running a plan on several hosts."""

from disco_jax.runtime.launch import connect, connected
from disco_jax.runtime.peers import Peers
from disco_jax.runtime.profile import Profile, measure_links, profile

__all__ = ["Peers", "Profile", "connect", "connected", "measure_links", "profile"]
