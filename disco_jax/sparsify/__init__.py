"""Learning what to send: scores, budgets, schedules, and the optax transform that uses them."""

from disco_jax.sparsify.budget import uniform
from disco_jax.sparsify.schedules import SCHEDULES, cubic, one_shot
from disco_jax.sparsify.scores import SCORES, l1, l2, random
from disco_jax.sparsify.transform import (
    SparseExchangeState,
    apply_masks,
    check_choice,
    prune,
    sparse_exchange,
)

__all__ = [
    "SCHEDULES",
    "SCORES",
    "SparseExchangeState",
    "apply_masks",
    "check_choice",
    "cubic",
    "l1",
    "l2",
    "one_shot",
    "prune",
    "random",
    "sparse_exchange",
    "uniform",
]
