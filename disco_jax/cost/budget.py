"""A budget in milliseconds: channels are bought with the time they take on link and node."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from disco_jax import wire
from disco_jax.cost.link import Link, Links
from disco_jax.errors import require
from disco_jax.sparsify.budget import Costs, Density, Masks, Scores, by_cost, columns
from disco_jax.trace import Images, Trace, exchanges, trace


@dataclasses.dataclass(frozen=True)
class Latency:
    """A budget for ``prune`` and ``sparse_exchange``: ``budget=cost.latency_budget(...)``.

    Buys the best score per second over all exchanges (see ``sparsify.by_cost``), where a channel
    costs the time of its bytes and of the multiplications that read it, and an exchange that
    survives costs the link's α. Pass ``density=0`` with it: what a density leaves on top of the
    latency is how a schedule comes down from the dense split.

    Attributes:
      seconds: what may be spent on remote channels.
      prices: for every exchange the seconds of one more channel for every node.
      charge: seconds of an exchange, whatever it carries.
      floor: see ``by_cost``.
    """

    seconds: float
    prices: Mapping[str, float]
    charge: float
    floor: float = 0.0

    def __call__(self, scores: Scores, costs: Costs | None, density: Density) -> Masks:
        """The masks that the time buys; ``costs`` in bytes are not used."""
        most = sum(self.prices[p] * columns(s) for p, s in scores.items())
        share = self.seconds / most if most else 1.0  # above 1: the charges take their part
        nodes = {p: s.shape[0] for p, s in scores.items()}
        return by_cost(
            scores,
            {p: self.prices[p] / nodes[p] for p in scores},
            {p: share + (1 - share) * density[p] for p in scores},
            floor=self.floor,
            charge=self.charge,
        )


def latency_budget(
    model: nnx.Module,
    images: Images,
    ms: float,
    links: Link | Links,
    *,
    gmacs: float,
    wire_dtype: str = "int8",
    floor: float = 0.0,
) -> Latency:
    """What ``ms`` milliseconds for ``images`` leave for remote channels on these links.

    Args:
      model: a masked model.
      images: what is to go through at once, or its ``jax.ShapeDtypeStruct``.
      ms: the latency to meet, as ``cost.predict`` counts it.
      links: between the nodes; in a hop the slowest counts.
      gmacs: multiplications per second of a node in 10⁹: of a profiled plan, ``macs_per_node /
        compute_ms / 1e6``.
      wire_dtype: what is to travel.
      floor: share of the average density that every exchange keeps.

    Raises:
      DiscoError: if the nodes cannot compute their own shares in that time.
    """
    found = exchanges(model)
    nodes = next(iter(found.values())).mesh.nodes
    traced, links = trace(model, images), Links.of(links)
    pairs = [links[a, b] for a in range(nodes) for b in range(nodes) if a != b] or [links.default]
    alpha = max(link.ms for link in pairs) / 1e3
    rate = min(link.bytes_per_second for link in pairs)
    examples, macs = images.shape[0], _macs_per_channel(found, traced)
    prices, rounds = dict.fromkeys(found, 0.0), []
    fixed = examples * _own_macs(found, traced, nodes) / gmacs / 1e9
    for record in traced.exchanges:
        if record.path in prices:
            size = examples * record.positions * wire.BITS[wire.check_wire_dtype(wire_dtype)] / 8
            prices[record.path] += size / rate
            rounds.append(nodes - 1)
        else:  # what is gathered is not for sale
            size = 4 * examples * record.positions * record.shape[-1] / nodes
            fixed += (nodes - 1) * (alpha + size / rate)
    prices = {p: s + examples * macs[p] / gmacs / 1e9 for p, s in prices.items()}
    require(
        ms / 1e3 > fixed,
        f"`ms` (={ms}) must be more than the {1e3 * fixed:.1f} ms that a node needs for its own "
        f"channels at {gmacs} GMAC/s; allow more time, or take more nodes",
    )
    return Latency(ms / 1e3 - fixed, prices, alpha * sum(rounds) / max(1, len(found)), floor)


def _macs_per_channel(found: Mapping[str, Any], traced: Trace) -> dict[str, float]:
    """Multiplications of one node for one more readable channel."""
    macs = dict.fromkeys(found, 0.0)
    for layer in traced.layers:
        if layer.exchange in found:
            macs[layer.exchange] += layer.macs / found[layer.exchange].channels
    return macs


def _own_macs(found: Mapping[str, Any], traced: Trace, nodes: int) -> float:
    """Multiplications of one node that hears nothing of the others."""
    return sum(layer.macs / (nodes if layer.exchange in found else 1) for layer in traced.layers)
