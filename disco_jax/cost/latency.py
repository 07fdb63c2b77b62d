"""Latency of a plan, predicted from its messages and multiplications."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from disco_jax import wire
from disco_jax.cost.link import Link, Links
from disco_jax.errors import require
from disco_jax.messages import Pairs, pieces
from disco_jax.plan.spec import CommunicationPlan, ExchangePlan


@dataclasses.dataclass(frozen=True)
class LinkTime:
    """Predicted time of one exchange, all of its calls together."""

    path: str
    traffic_bytes: int
    ms: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted latency.

    Attributes:
      exchanges: what each takes.
      compute_ms: what one node computes.
    """

    exchanges: tuple[LinkTime, ...]
    compute_ms: float

    @property
    def link_ms(self) -> float:
        """Time in exchanges."""
        return sum(e.ms for e in self.exchanges)

    @property
    def ms(self) -> float:
        """The latency."""
        return self.compute_ms + self.link_ms

    def __str__(self) -> str:
        table = Table("exchange", "bytes", "ms")
        for e in self.exchanges:
            table.add_row(e.path, f"{e.traffic_bytes:,}", f"{e.ms:.3f}")
        table.add_section()
        table.add_row("computation", "", f"{self.compute_ms:.3f}")
        table.add_row("latency", "", f"{self.ms:.3f}")
        console = Console(width=100)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


def predict(
    plan: CommunicationPlan,
    links: Link | Links,
    *,
    compute_ms: float | None = None,
    gmacs: float | None = None,
    examples: int = 1,
) -> Prediction:
    """The latency of a plan on nodes that compute and communicate in turn, as CPUs do.

    Every message of a hop starts when the slowest node is there, and the hop ends with its slowest
    message: ``Σ_layers macs / rate + Σ_hops max_links(α + bytes / β)``, where only bytes beyond
    what is left of a link's burst wait for β; nodes that have computed since the last message wait
    for the slower one as long as the links' jitter says. Images follow each other without a pause,
    so that a burst is there only as far as the link has recovered from the last message.

    Args:
      plan: of ``dj.freeze``.
      links: between the nodes.
      compute_ms: what one node computes, from ``runtime.profile``; shared out over the layers by
        their multiplications.
      gmacs: multiplications per second of a node in 10⁹, where that is not known.
      examples: images that go through together.

    Raises:
      DiscoError: if not exactly one of ``compute_ms`` and ``gmacs`` is given, or the latter is not
        above 0.

    >>> from disco_jax.packed import Hop
    >>> hop = Hop(1, ((0,), (1,)))
    >>> plan = CommunicationPlan(2, (ExchangePlan("conv", (), (1250,), 4, "int8", (hop,)),), ())
    >>> predict(plan, Link(mbit=10, ms=0.5), compute_ms=2.0).ms
    3.5
    """
    require(
        (compute_ms is None) != (gmacs is None),
        f"exactly one of `compute_ms` (={compute_ms}) and `gmacs` (={gmacs}) must be given; pass "
        "compute_ms= from runtime.profile, or the nodes' gmacs=",
    )
    require(gmacs is None or gmacs > 0, f"`gmacs` (={gmacs}) must be more than 0; measure it")
    if compute_ms is None:
        assert gmacs is not None
        compute_ms = examples * (plan.macs_per_node + _packing_macs(plan)) / gmacs / 1e6
    buckets = _Buckets(Links.of(links))
    share = compute_ms / 1e3 / max(1, plan.macs_per_node)
    for _ in range(2):  # the second time finds the buckets as the first has left them
        spent, since = {e.path: 0.0 for e in plan.exchanges}, 0.0
        for step in _steps(plan):
            if not isinstance(step, ExchangePlan):
                buckets.refill(step * share)
                since += step * share
            elif rounds := step.rounds(plan.nodes):
                waiting, since = buckets.links.jitter * since, 0.0
                buckets.refill(waiting)
                spent[step.path] += waiting
                for size, pairs in rounds:
                    count = pieces(size, plan.message_bytes)
                    for _ in range(count):
                        spent[step.path] += _round(pairs, examples * size / count, buckets)
    return Prediction(
        tuple(
            LinkTime(e.path, e.traffic_bytes(plan.nodes), 1e3 * spent[e.path])
            for e in plan.exchanges
        ),
        compute_ms,
    )


def _packing_macs(plan: CommunicationPlan) -> float:
    """Multiplications in whose time a node packs what it sends, and unpacks what it is sent."""
    return sum(
        wire.PACKING_MACS.get(e.wire_dtype, 0) * e.traffic_bytes(plan.nodes) / plan.nodes
        for e in plan.exchanges
    )


def _steps(plan: CommunicationPlan) -> Iterable[ExchangePlan | int]:
    """Exchanges, each before its first reader, and the multiplications of layers between them."""
    waiting = {e.path: e for e in plan.exchanges}
    for layer in plan.layers:
        if layer.exchange in waiting:
            yield waiting.pop(layer.exchange)
        yield layer.macs
    yield from waiting.values()


class _Buckets:
    """The token bucket of every link: how much of its burst is spent."""

    def __init__(self, links: Links):
        self.links = links
        self.spent: dict[tuple[int, int], float] = {}

    def refill(self, seconds: float) -> None:
        for pair, spent in self.spent.items():
            self.spent[pair] = max(0.0, spent - seconds * self.links[pair].bytes_per_second)

    def send(self, pair: tuple[int, int], size: float) -> float:
        """Seconds until the message is through."""
        link = self.links[pair]
        before = self.spent.get(pair, 0.0)
        queued = max(0.0, before + size - link.burst)
        self.spent[pair] = before + size
        seconds = max(size / link.peak_bytes_per_second, queued / link.bytes_per_second)
        return link.ms / 1e3 + seconds


def _round(pairs: Pairs, size: float, buckets: _Buckets) -> float:
    """Seconds until a message is through on each of these links."""
    seconds = max(buckets.send(pair, size) for pair in pairs)
    buckets.refill(seconds)
    return seconds
