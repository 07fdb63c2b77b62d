"""Deep vision models split over several small devices that learn what to tell each other."""

from disco_jax import cost, interop, layers, models, plan, runtime, sparsify
from disco_jax.errors import DiscoError
from disco_jax.exchange import Exchange, Local, Mask, Parts, Replicated
from disco_jax.gather import Everywhere, Gather, Statistics, Sum
from disco_jax.interop import Distributed, distribute
from disco_jax.mesh import NodeMesh
from disco_jax.packed import PackedExchange
from disco_jax.plan import CommunicationPlan, Frozen, freeze, load, lower, split, verify
from disco_jax.readable import Readable
from disco_jax.trace import name_exchanges, trace
from disco_jax.version import __version__

__all__ = [
    "CommunicationPlan",
    "DiscoError",
    "Distributed",
    "Everywhere",
    "Exchange",
    "Frozen",
    "Gather",
    "Local",
    "Mask",
    "NodeMesh",
    "PackedExchange",
    "Parts",
    "Readable",
    "Replicated",
    "Statistics",
    "Sum",
    "__version__",
    "cost",
    "distribute",
    "freeze",
    "interop",
    "layers",
    "load",
    "lower",
    "models",
    "name_exchanges",
    "plan",
    "runtime",
    "sparsify",
    "split",
    "trace",
    "verify",
]
