"""Plans: frozen masks, packed models, and the check that nothing else communicates."""

from disco_jax.plan.freeze import freeze, move
from disco_jax.plan.frozen import Frozen, Program, lower
from disco_jax.plan.hlo import Collective, collectives, verify
from disco_jax.plan.restore import load
from disco_jax.plan.share import share
from disco_jax.plan.spec import CommunicationPlan, ExchangePlan, LayerPlan
from disco_jax.plan.split import split

__all__ = [
    "Collective",
    "CommunicationPlan",
    "ExchangePlan",
    "Frozen",
    "LayerPlan",
    "Program",
    "collectives",
    "freeze",
    "load",
    "lower",
    "move",
    "share",
    "split",
    "verify",
]
