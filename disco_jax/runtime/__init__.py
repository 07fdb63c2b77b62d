"""Running a plan on several hosts."""

from disco_jax.runtime.launch import connect, connected
from disco_jax.runtime.links import measure_links
from disco_jax.runtime.peers import Peers
from disco_jax.runtime.profile import Profile, profile
from disco_jax.runtime.session import Session, mesh_of_hosts

__all__ = [
    "Peers",
    "Profile",
    "Session",
    "connect",
    "connected",
    "measure_links",
    "mesh_of_hosts",
    "profile",
]
