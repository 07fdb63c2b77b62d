"""A budget in milliseconds: channels are bought with the time they take on link and node."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from flax import nnx

from disco_jax import wire
from disco_jax.cost.link import Link, Links
from disco_jax.cost.options import NOTHING, Prices
from disco_jax.errors import require
from disco_jax.plan.split import ASKED
from disco_jax.sparsify.budget import Costs, Density, Masks, Scores, by_cost, columns
from disco_jax.trace import Images, exchanges, readers


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
    require(
        not hasattr(model, ASKED),
        f"`model` (={type(model).__name__}) is split by rows, which cannot be priced yet; plan "
        "with cost.plan_splits before dj.split, or choose densities by hand",
    )
    prices = Prices(model, images, Links.of(links), gmacs)
    found, reading = exchanges(model), readers(model)
    masked = {layer for path in found for layer, _ in reading[path]}
    size = prices.examples * wire.BITS[wire.check_wire_dtype(wire_dtype)] / 8
    own = sum(m / (prices.nodes if path in masked else 1) for path, m in prices.macs.items())
    gathered = sum((prices.everywhere(path) for path in prices.gathered), start=NOTHING)
    left = ms / 1e3 - prices.seconds([*gathered, prices.compute(own / prices.nodes)])
    require(
        left > 0,
        f"`ms` (={ms}) must be more than the {ms - 1e3 * left:.1f} ms that a node needs for its "
        "own channels; allow more time, or take more nodes",
    )
    channel = {}
    for path, exchange in found.items():
        macs = sum(prices.macs[layer] for layer, _ in reading[path]) / exchange.channels
        sent = size * sum(prices.positions[path])
        channel[path] = prices.seconds([0, sent, prices.compute(macs / prices.nodes)])
    hops = (prices.nodes - 1) * sum(len(prices.positions[path]) for path in found)
    return Latency(left, channel, prices.alpha * hops / max(1, len(found)), floor)
