"""Which pairs a budget buys: from the scores of all exchanges to their masks.

Budgets are pure functions ``(scores, costs, density) -> masks`` of whole models, and work under
``jax.jit`` with traced scores and densities. Dead channels have the score ``-inf``; what has it is
never bought. With ``level`` the unit bought is a *column*: one more channel for every reader over
one ring hop, so that packing needs no fill. Otherwise it is a single (node, channel) pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from disco_jax.errors import require
from disco_jax.partition import owned

Scores = Mapping[str, Float[Array, "node channel"]]
Costs = Mapping[str, float]
Masks = dict[str, Bool[Array, "node channel"]]
Density = Mapping[str, float | Float[Array, ""]]
Budget = Callable[..., Masks]


def uniform(scores: Scores, costs: Costs | None, density: Density) -> Masks:
    """The same share of every exchange, level over nodes and hops: ``⌊density · columns⌋``.

    What rounding leaves of the total is given to the exchanges with the largest remainders, while
    it lasts; the scores only say which columns of an exchange are the best.

    Args:
      scores: what each (node, channel) pair is worth, for every exchange.
      costs: bytes of one channel on one link, for every exchange. None leaves what rounding leaves:
        without costs nobody knows what it would buy.
      density: share of the remote pairs to keep, 0 to 1, for every exchange. A ceiling.

    >>> scores = {"a": jnp.array([[0., 0., 1., 2.], [4., 3., 0., 0.]])}
    >>> uniform(scores, {"a": 1.0}, {"a": 0.5})["a"].astype(int).tolist()
    [[1, 1, 0, 1], [1, 0, 1, 1]]
    """
    paths = [p for p in scores if scores[p].shape[0] > 1]
    if not paths:
        return {p: _own(s) for p, s in scores.items()}
    sizes = np.array([columns(scores[p]) for p in paths], np.float32)
    wanted = jnp.stack([jnp.asarray(density[p], jnp.float32) for p in paths]) * sizes
    # A thousandth of a column makes up for densities that binary fractions cannot hold.
    counts = jnp.floor(wanted + 1e-3)
    if costs is not None:
        prices = np.array([costs[p] * scores[p].shape[0] for p in paths], np.float32)
        left = jnp.sum((wanted - counts) * prices) + 1e-3 * prices.min()
        remainder = jnp.where(counts < sizes, wanted - counts, -1.0)
        order = jnp.argsort(-remainder, stable=True)
        more = _afford(jnp.asarray(prices)[order], (remainder > 1e-3)[order], left)
        counts = counts.at[order].add(more)
    chosen = {p: _level(scores[p], counts[i]) for i, p in enumerate(paths)}
    return {p: chosen[p] if p in chosen else _own(s) for p, s in scores.items()}


def by_cost(
    scores: Scores,
    costs: Costs,
    density: Density,
    *,
    floor: float = 0.0,
    charge: float = 0.0,
    level: bool = True,
) -> Masks:
    """One budget for all exchanges: the best score per byte first.

    The scores of different exchanges are compared, so they should be: see ``relative``.

    Args:
      scores, costs, density: as in :func:`uniform`; the densities and costs make up the total.
      floor: share of its own density that every exchange keeps whatever its scores are. Without
        one, greed silences layers that need to talk.
      charge: bytes that an exchange costs if anything of it survives (latency is bytes too), so
        that whole exchanges vanish. An exchange goes when what it is worth beyond the marginal
        price of its bytes does not pay for the charge (Lagrangian relaxation of the fixed-charge
        knapsack).
      level: see above.

    >>> scores = {"a": jnp.array([[0., 3.], [3., 0.]]), "b": jnp.array([[0., 2.], [2., 0.]])}
    >>> masks = by_cost(scores, {"a": 4.0, "b": 1.0}, {"a": 0.4, "b": 0.4})
    >>> {k: int(v.sum()) - 2 for k, v in masks.items()}
    {'a': 0, 'b': 2}
    """
    paths = [p for p in scores if scores[p].shape[0] > 1]
    if not paths:
        return {p: _own(s) for p, s in scores.items()}
    worth = [_worth(scores[p], level) for p in paths]  # [hop, rank] or [node, channel]
    units = np.concatenate([np.full(w.size, i) for i, w in enumerate(worth)])
    each = np.array([costs[p] * (scores[p].shape[0] if level else 1) for p in paths], np.float32)
    price = each[units]
    value = jnp.concatenate([w.ravel() for w in worth])
    total: Any = sum(
        costs[p] * jnp.asarray(density[p], jnp.float32) * _remote(scores[p]) for p in paths
    )
    alive = jnp.isfinite(value)
    if charge > 0:
        survives = _survivors(value, price, units, len(paths), total, charge)
        alive &= survives[units]
        total -= charge * survives.sum()
    first = jnp.concatenate(
        [
            _best(w, floor * jnp.asarray(density[p], jnp.float32))
            for p, w in zip(paths, worth, strict=True)
        ]
    )
    bought = _spend(jnp.where(alive, value, -jnp.inf), price, total, first)
    masks = {p: _own(s) for p, s in scores.items()}
    for i, p in enumerate(paths):
        mine = bought[np.flatnonzero(units == i)].reshape(worth[i].shape)
        masks[p] = _widths(scores[p], mine.sum(1)) if level else masks[p] | mine
    return masks


def per_link(
    scores: Scores, costs: Costs, density: Density, *, links: Float[np.ndarray, "node node"]
) -> Masks:
    """A budget for every directed link, spent on its own best pairs, the best per byte first.

    Args:
      scores, costs, density: as in :func:`uniform`.
      links: row ``d``, column ``s`` scales what density and costs allow from ``s`` to ``d``; a slow
        link has less than 1.

    Raises:
      DiscoError: if ``links`` has not one row and column for each node, or less than 0 somewhere.

    >>> scores = {"a": jnp.array([[0., 0., 1., 2.], [4., 3., 0., 0.]])}
    >>> links = np.array([[0., 1.], [2., 0.]])
    >>> per_link(scores, {"a": 1.0}, {"a": 0.5}, links=links)["a"].astype(int).tolist()
    [[1, 1, 0, 1], [1, 1, 1, 1]]
    """
    links = np.asarray(links)
    nodes = next((s.shape[0] for s in scores.values()), len(links))
    require(
        links.shape == (nodes, nodes) and bool((links >= 0).all()),
        f"`links` (={links.tolist()}) must have a row and a column for each of the {nodes} nodes, "
        "and nothing below 0; 1 allows what the density says",
    )
    masks = {p: _own(s) for p, s in scores.items()}
    for reader, owner in np.argwhere(~np.eye(len(links), dtype=bool)):
        size = [scores[p].shape[1] // len(links) for p in scores]
        block = {p: slice(owner * k, (owner + 1) * k) for p, k in zip(scores, size, strict=True)}
        value = jnp.concatenate([s[reader, block[p]] for p, s in scores.items()])
        price = np.repeat([np.float32(costs[p]) for p in scores], size)
        total = links[reader, owner] * sum(
            jnp.asarray(density[p]) * costs[p] * k for p, k in zip(scores, size, strict=True)
        )
        bought = jnp.split(_spend(value, price, total), np.cumsum(size)[:-1])
        for p, chosen in zip(scores, bought, strict=True):
            masks[p] = masks[p].at[reader, block[p]].set(chosen)
    return masks


def relative(scores: Scores) -> Scores:
    """Squared scores as shares of all that an exchange's readers read, their own channels included.

    Makes magnitudes of different layers comparable: a norm after the layer undoes its scale.

    >>> relative({"a": jnp.array([[2., 0.], [2., 0.]])})["a"].tolist()
    [[0.5, 0.0], [0.5, 0.0]]
    """

    def one(s: Array) -> Array:
        energy = jnp.where(jnp.isfinite(s), s, 0.0) ** 2
        share = energy / jnp.maximum(energy.sum(), jnp.finfo(s.dtype).tiny)
        return jnp.where(jnp.isfinite(s), share, -jnp.inf)

    return {path: one(s) for path, s in scores.items()}


BUDGETS: dict[str, Budget] = {"by_cost": by_cost, "per_link": per_link, "uniform": uniform}


def _own(scores: Array) -> Array:
    return jnp.asarray(owned(scores.shape[1], scores.shape[0]))


def _remote(scores: Array) -> int:
    """Remote (node, channel) pairs of an exchange."""
    nodes, channels = scores.shape
    return (nodes - 1) * channels


def columns(scores: Array) -> int:
    """Columns of an exchange: for every hop, as many as a node owns channels."""
    nodes, channels = scores.shape
    return (nodes - 1) * (channels // nodes)


def _ring(nodes: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices ``[reader, hop, channel]`` into ``[node, channel]``: hop k reads owner reader-k-1."""
    reader = np.arange(nodes)[:, None, None]
    owner = (reader - np.arange(1, nodes)[None, :, None]) % nodes
    block = channels // nodes
    return np.broadcast_arrays(reader, owner * block + np.arange(block))  # type: ignore[return-value]


def _rank(values: Float[Array, "... k"]) -> Array:
    """0 for the largest along the last axis; ties go to the first."""
    return jnp.argsort(jnp.argsort(-values, axis=-1, stable=True), axis=-1)


def _worth(scores: Array, level: bool) -> Array:
    """What each unit is worth: ``[hop, rank]`` columns, or ``[node, channel]`` pairs."""
    return column_worth(scores) if level else jnp.where(_own(scores), -jnp.inf, scores)


def column_worth(scores: Float[Array, "node channel"]) -> Float[Array, "hop rank"]:
    """What the first, second, ... column over each hop is worth: the sum over the readers' best.

    >>> column_worth(jnp.array([[0., 0., 1., 2.], [4., 3., 0., 0.]])).tolist()
    [[6.0, 4.0]]
    """
    hops = -jnp.sort(-scores[_ring(*scores.shape)], axis=-1)  # [node, hop, rank]
    return jnp.where(
        jnp.isfinite(hops).any(0), jnp.where(jnp.isfinite(hops), hops, 0).sum(0), -jnp.inf
    )


def _best(worth: Array, share: Array) -> Array:
    """True for the best ``share`` of an exchange's units, flat."""
    flat = worth.ravel()
    return (_rank(flat) < jnp.floor(share * jnp.isfinite(flat).sum() + 1e-3)) & jnp.isfinite(flat)


def _afford(prices: Array, wanted: Array, total: Array) -> Array:
    """Buys in order what is wanted and still fits: ``bool[unit]``."""

    def buy(left: Array, unit: tuple[Array, Array]) -> tuple[Array, Array]:
        price, want = unit
        fits = want & (price <= left)
        return left - jnp.where(fits, price, 0), fits

    return jax.lax.scan(buy, jnp.asarray(total, jnp.float32), (prices, wanted))[1]


def _spend(value: Array, price: np.ndarray, total: Array, first: Array | bool = False) -> Array:
    """Buys the best value for its price, ``first`` before all others; never what is ``-inf``."""
    alive = jnp.isfinite(value)
    ratio = jnp.where(alive, value, 0) / price
    order = jnp.lexsort((-ratio, ~jnp.broadcast_to(first, value.shape)))
    bought = _afford(jnp.asarray(price)[order], alive[order], total * (1 + 1e-5))
    return jnp.zeros(len(price), bool).at[order].set(bought)


def _level(scores: Array, count: Array) -> Array:
    """The best ``count`` columns of one exchange, spread evenly over the hops."""
    nodes, channels = scores.shape
    width, extra = jnp.divmod(count, nodes - 1)
    gain = jnp.take(
        column_worth(scores), jnp.minimum(width, channels // nodes - 1).astype(int), axis=-1
    )
    return _widths(scores, width + (_rank(gain) < extra))


def _widths(scores: Array, widths: Float[Array, "hop"]) -> Array:
    """The mask in which every node reads its ``widths`` best channels over each hop."""
    ring = _ring(*scores.shape)
    hops = scores[ring]
    keep = (_rank(hops) < widths[:, None]) & jnp.isfinite(hops)
    return jnp.zeros(scores.shape, bool).at[ring].set(keep) | _own(scores)


def _survivors(
    value: Array, price: np.ndarray, units: np.ndarray, count: int, total: Array, charge: float
) -> Bool[Array, "exchange"]:
    """Exchanges that pay for the charge at the lowest marginal price that meets the total."""

    def at(price_of_byte: Array) -> tuple[Array, Array]:
        gain = jnp.where(jnp.isfinite(value), value, 0) - price_of_byte * price
        surplus = jax.ops.segment_sum(jnp.maximum(gain, 0), units, count) - price_of_byte * charge
        size = charge + jax.ops.segment_sum(jnp.where(gain > 0, price, 0), units, count)
        return surplus, size

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        surplus, size = at(jnp.exp(middle))
        fits = jnp.sum((surplus > 0) * size) <= total
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    ratio = jnp.where(jnp.isfinite(value), value, 0) / price
    highest = jnp.log(jnp.maximum(ratio.max(), 1e-30)) + 1
    low, _ = jax.lax.fori_loop(0, 60, halve, (highest - 40, highest))
    # At the highest price that is still too low, exchanges that tie are taken while they fit.
    surplus, size = at(jnp.exp(low))
    order = jnp.argsort(-surplus, stable=True)
    taken = _afford(size[order], (surplus > 0)[order], total)
    return jnp.zeros(count, bool).at[order].set(taken)
