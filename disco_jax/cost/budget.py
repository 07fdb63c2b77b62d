"""A budget in milliseconds: channels are bought with the time they take on link and node."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from disco_jax import wire
from disco_jax.cost.link import Link, Links
from disco_jax.errors import require
from disco_jax.plan.split import ASKED
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
    prices = price(model, images, links, gmacs=gmacs)
    size = wire.BITS[wire.check_wire_dtype(wire_dtype)] / 8
    channel = {p: size * prices.byte[p] + macs for p, macs in prices.macs.items()}
    hops = (prices.nodes - 1) * sum(prices.calls.values())
    return Latency(
        prices.left_of(ms), channel, prices.hop * hops / max(1, len(prices.calls)), floor
    )


@dataclasses.dataclass(frozen=True)
class Prices:
    """What exchanging costs, in seconds.

    Attributes:
      nodes: how many there are.
      byte: for every exchange, one more byte per position for every node.
      macs: for every exchange, the multiplications that read one more channel on every node.
      calls: for every exchange how often it is called.
      hop: a message, whatever it carries.
      fixed: what nodes compute and gather whatever the masks are.
    """

    nodes: int
    byte: dict[str, float]
    macs: dict[str, float]
    calls: dict[str, int]
    hop: float
    fixed: float

    def left_of(self, ms: float) -> float:
        """Seconds that a latency leaves for remote channels."""
        require(
            ms / 1e3 > self.fixed,
            f"`ms` (={ms}) must be more than the {1e3 * self.fixed:.1f} ms that a node needs for "
            "its own channels; allow more time, or take more nodes",
        )
        return ms / 1e3 - self.fixed


def price(model: nnx.Module, images: Images, links: Link | Links, *, gmacs: float) -> Prices:
    """Prices of a masked model's exchanges; the arguments are those of :func:`latency_budget`."""
    require(
        not hasattr(model, ASKED),
        f"`model` (={type(model).__name__}) is split by rows, which cannot be priced yet; plan for "
        "a latency without dj.split, or choose densities by hand",
    )
    found = exchanges(model)
    nodes = next(iter(found.values())).mesh.nodes
    traced, links = trace(model, images), Links.of(links)
    pairs = [links[a, b] for a in range(nodes) for b in range(nodes) if a != b] or [links.default]
    alpha = max(link.ms for link in pairs) / 1e3
    rate = min(link.bytes_per_second for link in pairs)
    examples, macs = images.shape[0], _macs_per_channel(found, traced)
    byte, calls = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0)
    fixed = examples * _own_macs(found, traced, nodes) / gmacs / 1e9
    for record in traced.exchanges:
        if record.path in byte:
            byte[record.path] += examples * record.positions / rate
            calls[record.path] += 1
        else:  # what is gathered is not for sale
            numbers = examples * record.positions * record.shape[-1] // nodes
            size = wire.message_bytes(numbers, record.dtype)
            fixed += (nodes - 1) * (alpha + size / rate)
    seconds = {p: examples * m / gmacs / 1e9 for p, m in macs.items()}
    return Prices(nodes, byte, seconds, calls, alpha, fixed)


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
