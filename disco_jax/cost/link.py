"""Links between nodes, as the α-β model of communication sees them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from disco_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Link:
    """A directed link: ``n`` bytes take ``α + n / β`` (Hockney 1994).

    Attributes:
      mbit: β, the rate, in Mbit/s.
      ms: α, the time that an empty message takes, in ms.
      burst: bytes that a link which has been idle takes at once, before its rate counts. 0 for a
        wire; more where the rate is imposed by a token bucket (``tc … tbf``, many providers).
      peak_mbit: the rate of a burst, in Mbit/s: what the hosts themselves can send and receive.
      jitter: how much later than the other a node is done with what both compute before a message,
        as a share of it: no two runs take the same time, and each waits for the slower.

    Raises:
      DiscoError: if a rate is not positive, or another number is negative.

    >>> Link(mbit=100, ms=0.5).seconds(6_250)
    0.001
    """

    mbit: float
    ms: float = 0.2
    burst: float = 0.0
    peak_mbit: float = math.inf
    jitter: float = 0.0

    def __post_init__(self) -> None:
        require(
            min(self.mbit, self.peak_mbit) > 0 and min(self.ms, self.burst, self.jitter) >= 0,
            f"`link` (={self!r}) must have positive rates (mbit, peak_mbit), and no negative "
            "latency (ms), burst (bytes) or jitter; correct it",
        )

    @property
    def bytes_per_second(self) -> float:
        """β in bytes/s."""
        return self.mbit * 125_000

    @property
    def peak_bytes_per_second(self) -> float:
        """The rate of a burst in bytes/s, which is never below β."""
        return max(self.mbit, self.peak_mbit) * 125_000

    def seconds(self, size: float) -> float:
        """The time that a message of ``size`` bytes takes on a link that is busy all the time."""
        return self.ms / 1e3 + size / self.bytes_per_second


@dataclasses.dataclass(frozen=True)
class Links:
    """The links between all nodes: one for every directed pair, or the same for all.

    >>> slow, fast = Link(mbit=10), Link(mbit=100)
    >>> Links(fast, {(0, 1): slow})[0, 1].mbit
    10
    """

    default: Link
    pairs: Mapping[tuple[int, int], Link] = dataclasses.field(default_factory=dict)

    def __getitem__(self, pair: tuple[int, int]) -> Link:
        """The link from the first to the second node."""
        return self.pairs.get(pair, self.default)

    @property
    def jitter(self) -> float:
        """The largest of all."""
        return max(link.jitter for link in (self.default, *self.pairs.values()))

    @classmethod
    def of(cls, links: Any) -> Links:
        """Takes a :class:`Link` for all as well."""
        return links if isinstance(links, cls) else cls(links)
