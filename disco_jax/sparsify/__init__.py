"""Learning what to send: scores, budgets, schedules, and the optax transform that uses them."""

from disco_jax.sparsify import gates
from disco_jax.sparsify.assignment import assign
from disco_jax.sparsify.budget import BUDGETS, by_cost, per_link, relative, uniform
from disco_jax.sparsify.calibrate import channel_norms, reestimate_statistics
from disco_jax.sparsify.choice import Choice, check_choice
from disco_jax.sparsify.pruning import prune
from disco_jax.sparsify.quantise import quantise
from disco_jax.sparsify.reconstruction import post_training, reconstruction_scores
from disco_jax.sparsify.schedules import SCHEDULES, constant, cubic, linear, one_shot
from disco_jax.sparsify.scores import SCORES, activation, l1, l2, none, random, taylor
from disco_jax.sparsify.transform import (
    REGROW,
    SparseExchangeState,
    allow_regrowth,
    apply_masks,
    sparse_exchange,
    wire_costs,
)

__all__ = [
    "BUDGETS",
    "REGROW",
    "SCHEDULES",
    "SCORES",
    "Choice",
    "SparseExchangeState",
    "activation",
    "allow_regrowth",
    "apply_masks",
    "assign",
    "by_cost",
    "channel_norms",
    "check_choice",
    "constant",
    "cubic",
    "gates",
    "l1",
    "l2",
    "linear",
    "none",
    "one_shot",
    "per_link",
    "post_training",
    "prune",
    "quantise",
    "random",
    "reconstruction_scores",
    "reestimate_statistics",
    "relative",
    "sparse_exchange",
    "taylor",
    "uniform",
    "wire_costs",
]
