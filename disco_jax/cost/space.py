"""All that may be chosen for a model, and the best of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from disco_jax.cost.options import Options, Prices
from disco_jax.cost.planned import Choice, Planned, Point
from disco_jax.cost.search import SECONDS, WEIGHTS, Edge, Found, Search
from disco_jax.cost.units import Reading, Units
from disco_jax.cost.worth import Worth
from disco_jax.errors import require
from disco_jax.plan.split import CHANNELS, ROWS

FRONT = 5  # limits of memory that a front has

Splits = tuple[tuple[str, ...], ...]  # what each unit may be split along


class Space:
    """All that may be chosen for a model."""

    def __init__(self, units: Units, prices: Prices, worth: Mapping[str, Worth], density: float):
        self.units, self.prices, self.worth = units, prices, worth
        self.fixed = np.array([prices.fixed(units), 0.0, 0.0])
        self.searches: dict[tuple[Splits, float], Search] = {}
        self.options: list[dict[tuple[str, str], Options]] = []
        for r in self.units.readings:
            pairs = [
                (s, t) for s in self.units.splits[r.source] for t in self.units.splits[r.target]
            ]
            both = ((pair, prices.options(r, *pair, worth.get(r.path), density)) for pair in pairs)
            self.options.append(
                {
                    pair: found
                    for pair, found in both
                    if found is not None and (r.source != r.target or pair[0] == pair[1])
                }
            )

    def only(self, split: str) -> Splits:
        """All units split one way that can be."""
        return tuple((split,) if split in s else s for s in self.units.splits)

    def least(self, splits: Splits, objective: int, limits: Mapping[int, float]) -> Found | None:
        """The choice of least ``objective`` within limits.

        Behind a token bucket it depends on all that is sent how much of it waits: then that is
        tried, and of what comes out the latency as a whole counts.
        """
        found, every = [], [splits]
        if splits == self.units.splits:
            every += [self.only(CHANNELS), self.only(ROWS)]
        shares = (1.0, 0.5, 0.0) if self.prices.burst else (1.0,)
        for allowed, waits in itertools.product(every, shares):
            if (allowed, waits) not in self.searches:
                self.searches[allowed, waits] = self._search(allowed, waits)
            one = self.searches[allowed, waits].least(objective, limits)
            if one is not None:
                steps = [options.steps[:, i] for _, options, i in self.chosen(one)]
                totals = np.array([self.prices.latency(steps), *one.totals[1:]])
                found.append(dataclasses.replace(one, totals=totals))
        in_time = [f for f in found if f.totals[SECONDS] <= limits.get(SECONDS, np.inf)]
        return min(in_time, key=lambda f: f.totals[objective], default=None)

    def _search(self, splits: Splits, waits: float) -> Search:
        edges = []
        for r, options in zip(self.units.readings, self.options, strict=True):
            allowed = {
                (s, t): np.stack([self.prices.seconds(o.steps, waits), o.weights, o.loss])
                for (s, t), o in options.items()
                if s in splits[r.source] and t in splits[r.target]
            }
            edges.append(Edge(r.source, r.target, allowed))
        return Search(splits, edges)

    def limits(self, ms: float | None, memory: float | None) -> dict[int, float]:
        """By total, less what is fixed."""
        limits = {}
        if ms is not None:
            limits[SECONDS] = ms / 1e3 - self.fixed[SECONDS]
        if memory is not None:
            limits[WEIGHTS] = memory * self.prices.weights
        return limits

    def chosen(self, found: Found) -> Iterator[tuple[Reading, Options, int]]:
        """The options of every reading, and which of them."""
        for r, options, i in zip(self.units.readings, self.options, found.chosen, strict=True):
            yield r, options[found.splits[r.source], found.splits[r.target]], i

    def point(self, found: Found) -> Point:
        seconds, weights, loss = found.totals + self.fixed
        kept = float(np.exp(-loss / max(1, len(self.worth))))
        return Point(1e3 * float(seconds), float(weights / self.prices.weights), kept)

    def planned(
        self, found: Found, alternatives: Mapping[str, Point], front: tuple[Point, ...]
    ) -> Planned:
        choices: dict[str, Choice] = {}
        layers: list[str] = []
        for r, chosen, i in self.chosen(found):
            if found.splits[r.target] == ROWS and not r.repeats:
                layers += r.layers
            if chosen.dtypes[i]:
                ms = 1e3 * float(self.prices.seconds(chosen.steps[:, i]))
                density = chosen.counts[i] / max(1, len(self.worth[r.path].columns))
                kept = float(np.exp(-chosen.loss[i]))
                choices[r.path] = Choice(density, chosen.dtypes[i], ms, kept)
        return Planned(
            **dataclasses.asdict(self.point(found)),
            layers=tuple(layers),
            row_dtype=self.prices.row_dtype,
            choices=choices,
            fixed_ms=1e3 * float(self.fixed[SECONDS]),
            alternatives=alternatives,
            front=front,
        )

    def front(self, splits: Splits) -> tuple[Point, ...]:
        """The fastest plans of several limits of memory, and none that another one beats."""
        ends = [self.least(splits, which, {}) for which in (WEIGHTS, SECONDS)]
        least, most = (end.totals[WEIGHTS] for end in ends if end is not None)
        points: list[Point] = []
        for limit in np.linspace(least * 1.001, most, FRONT):
            other = self.least(splits, SECONDS, {WEIGHTS: limit})
            if other is not None and (not points or self.point(other).ms < points[-1].ms):
                points.append(self.point(other))
        return tuple(points)

    def refuse(
        self, splits: Splits, limits: Mapping[int, float], asked: Mapping[int, float | None]
    ) -> None:
        """Says which limit cannot be met."""
        for which, most in limits.items():
            least = self.least(splits, which, {})
            assert least is not None
            point = self.point(least)
            name, reached = {
                SECONDS: ("ms", f"{point.ms:.2f} ms"),
                WEIGHTS: ("memory", f"{point.memory:.3f} of the weights"),
            }[which]
            require(
                least.totals[which] <= most,
                f"`{name}` (={asked[which]}) cannot be met: the least possible is {reached}; allow "
                "more, take more nodes, or a lower density",
            )
        require(
            False,
            f"`ms` (={asked[SECONDS]}) and `memory` (={asked[WEIGHTS]}) cannot be met together; "
            "allow more of one of them, or a lower density",
        )
