"""Which pairs a budget buys: from scores to masks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from disco_jax.partition import owned


def uniform(
    scores: Float[Array, "node channel"],
    density: float | Float[Array, ""],
    features: int | None = None,
) -> Bool[Array, "node channel"]:
    """Keeps the same share of remote channels in every row: ``⌊density · remote channels⌋``.

    Each node reads equally many channels over each ring hop, give or take one, so that packing
    needs no fill; the hops that get one more are those where it is worth most. Within a (node,
    hop) the best scores win. Works under ``jax.jit`` with a traced density.

    Args:
      scores: what each (node, channel) pair is worth.
      density: share of the remote pairs to keep, 0 to 1. Rounded down: a budget is a ceiling.
      features: number of channels that are alive (all, by default); dead ones are never read.

    Returns:
      The mask, own channels included.

    >>> scores = jnp.array([[0., 0., 1., 2.], [4., 3., 0., 0.]])
    >>> uniform(scores, 0.5).astype(int).tolist()
    [[1, 1, 0, 1], [1, 0, 1, 1]]
    """
    nodes, channels = scores.shape
    own = owned(channels, nodes)
    if nodes == 1:
        return jnp.asarray(own)
    alive = np.arange(channels) < (features or channels)
    block = channels // nodes
    hops = jnp.where(alive, scores, -jnp.inf)[_ring(nodes, channels)]  # [node, hop, block]
    # A thousandth of a channel makes up for densities that binary fractions cannot hold.
    total = jnp.floor(density * (nodes - 1) * block + 1e-3)
    width, extra = jnp.divmod(total, nodes - 1)
    best_first = -jnp.sort(-hops, axis=-1)
    next_best = jnp.minimum(width, block - 1).astype(int)
    gain = jnp.take(best_first, next_best, axis=-1).sum(0)  # [hop]
    widths = width + (_rank(gain) < extra)
    keep = (_rank(hops) < widths[:, None]) & jnp.isfinite(hops)
    mask = jnp.zeros((nodes, channels), bool).at[_ring(nodes, channels)].set(keep)
    return mask | own


def _ring(nodes: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices ``[reader, hop, channel]`` into ``[node, channel]``: hop k reads owner reader-k-1."""
    reader = np.arange(nodes)[:, None, None]
    owner = (reader - np.arange(1, nodes)[None, :, None]) % nodes
    block = channels // nodes
    return np.broadcast_arrays(reader, owner * block + np.arange(block))  # type: ignore[return-value]


def _rank(values: Float[Array, "... k"]) -> Array:
    """0 for the largest along the last axis; ties go to the first."""
    return jnp.argsort(jnp.argsort(-values, axis=-1, stable=True), axis=-1)
