"""Finds the best splits and options: dynamic programming over the units, multipliers for limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

SECONDS, WEIGHTS, LOSS = 0, 1, 2
STEPS = 15  # halvings of a multiplier's logarithm

Trail = tuple[int, str, "Trail"] | None  # unit, split, and those before


@dataclasses.dataclass(frozen=True)
class Edge:
    """A reading between two units, and what each pair of their splits allows.

    Attributes:
      source: a unit.
      target: a unit, which may be the same.
      options: for every pair of splits that goes together ``float[3, option]``: seconds, bytes of
        weights and loss.
    """

    source: int
    target: int
    options: Mapping[tuple[str, str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Found:
    """A choice of everything.

    Attributes:
      splits: of every unit.
      chosen: of every edge, the option.
      totals: ``float[3]``: seconds, bytes of weights and loss.
    """

    splits: tuple[str, ...]
    chosen: tuple[int, ...]
    totals: np.ndarray


class Search:
    """Chooses splits and options of all edges together.

    With a price for each total the sum falls apart into edges. Units are then decided one after
    another, each when its last edge is reached (variable elimination; Bertelè & Brioschi 1972): of
    a network that is a chain of blocks only a few are ever open. Limits are met by multipliers
    (Everett 1963), and what their steps leave over is spent greedily.

    Args:
      splits: what each unit may be split along.
      edges: in the order of computation.
    """

    def __init__(self, splits: Sequence[Sequence[str]], edges: Sequence[Edge]):
        self.splits, self.edges = splits, edges
        self.last = {u: i for i, e in enumerate(edges) for u in (e.source, e.target)}
        segments = [(i, pair) for i, e in enumerate(edges) for pair in e.options]
        self.segments = {segment: n for n, segment in enumerate(segments)}
        found = [edges[i].options[pair] for i, pair in segments]
        most = max(costs.shape[1] for costs in found)
        pad = [((0, 0), (0, most - costs.shape[1])) for costs in found]
        padded = [np.pad(c, p, constant_values=np.inf) for c, p in zip(found, pad, strict=True)]
        self.costs = np.stack(padded, 1)  # [3, segment, option]
        largest = np.where(np.isfinite(self.costs), self.costs, 0).max(-1)
        self.scale = np.maximum(1e-12, largest.sum(-1))

    def least(self, objective: int, limits: Mapping[int, float]) -> Found | None:
        """The choice of least ``objective`` within limits of other totals; None: there is none."""
        weights, wanted = np.full(3, 1e-9), list(limits.items())  # settles what would be left open
        weights[objective] = 1.0
        tried: dict[tuple[str, ...], None] = {}
        # Multipliers jump over splits that no price makes the best: of those seen on the way each
        # gets its own best options.
        found = [self._meet(weights, wanted, tried=tried)]
        found += [self._meet(weights, wanted, splits) for splits in tried]
        if not any(found):  # or over all that the limits allow, which may still begin somewhere
            found += [self._start(which, limits) for which in limits]
        filled = [self._fill(one, objective, limits) for one in found if one is not None]
        return min(filled, key=lambda one: one.totals[objective], default=None)

    def _start(self, which: int, limits: Mapping[int, float]) -> Found | None:
        """The choice that has the most left of one limit, if it keeps to it."""
        others = {other: most for other, most in limits.items() if other != which}
        found = self.least(which, others)
        return found if found is not None and found.totals[which] <= limits[which] else None

    def _meet(
        self,
        weights: np.ndarray,
        limits: Sequence[tuple[int, float]],
        splits: tuple[str, ...] | None = None,
        tried: dict[tuple[str, ...], None] | None = None,
    ) -> Found | None:
        """The least weighted sum, with multipliers for limits as small as may be.

        Of the given splits, or else of the best, which are then added to those ``tried``.
        """
        if not limits:
            last = self._at(weights / self.scale, splits)
            if tried is not None:
                tried[last.splits] = None
            return last
        (which, most), *others = limits
        best, low, high = None, -16.0, 16.0

        def at(price: float) -> Found | None:
            raised = weights.copy()
            raised[which] += price * weights.max()  # so that the last limit can outweigh the others
            return self._meet(raised, others, splits, tried)

        for price in (0.0, np.exp(high)):
            found = at(price)
            if found is not None and found.totals[which] <= most:
                best = found
                if price == 0:
                    return best
        if best is None:
            return None
        for _ in range(STEPS):
            middle = (low + high) / 2
            found = at(np.exp(middle))
            if found is not None and found.totals[which] <= most:
                best, high = found, middle
            else:
                low = middle
        return best

    def _at(self, prices: np.ndarray, splits: tuple[str, ...] | None) -> Found:
        """The choice of least cost."""
        values = np.tensordot(prices, self.costs, 1)
        best = values.argmin(-1)
        splits = splits or self._splits(values.min(-1))
        segments = self._segments(splits)
        chosen = best[segments]
        return Found(splits, tuple(chosen.tolist()), self.costs[:, segments, chosen].sum(-1))

    def _segments(self, splits: tuple[str, ...]) -> np.ndarray:
        """Of every edge, the options that the splits leave."""
        pairs = ((splits[e.source], splits[e.target]) for e in self.edges)
        return np.array([self.segments[i, pair] for i, pair in enumerate(pairs)])

    def _splits(self, least: np.ndarray) -> tuple[str, ...]:
        """The splits of all units, given the least cost of every pair of an edge."""
        live: list[int] = []
        states: dict[tuple[str, ...], tuple[float, Trail]] = {(): (0.0, None)}
        for i, edge in enumerate(self.edges):
            for unit in (edge.source, edge.target):
                if unit not in live:
                    live.append(unit)
                    states = {
                        (*key, split): (cost, (unit, split, trail))
                        for key, (cost, trail) in states.items()
                        for split in self.splits[unit]
                    }
            a, b = live.index(edge.source), live.index(edge.target)
            price = {pair: least[self.segments[i, pair]] for pair in edge.options}
            states = {
                key: (cost + price[key[a], key[b]], trail)
                for key, (cost, trail) in states.items()
                if (key[a], key[b]) in price
            }
            for unit in {edge.source, edge.target}:
                if self.last[unit] == i:
                    states = _without(states, live.index(unit))
                    live.remove(unit)
        _, trail = min(states.values(), key=lambda state: state[0])
        splits = [options[0] for options in self.splits]
        while trail is not None:
            unit, split, trail = trail
            splits[unit] = split
        return tuple(splits)

    def _fill(self, found: Found, objective: int, limits: Mapping[int, float]) -> Found:
        """Takes other options, of the same splits, while that pays and the limits allow it."""
        costs = self.costs[:, self._segments(found.splits)]  # [3, edge, option]
        now, edges = np.array(found.chosen), np.arange(len(self.edges))
        totals = found.totals
        while True:
            change = costs - costs[:, edges, now][..., None]
            gain, use = -change[objective], np.full(change.shape[1:], 1e-12)
            fits = gain > 1e-9 * self.scale[objective]
            for which, most in limits.items():
                fits &= change[which] <= most - totals[which]
                use += np.maximum(0, change[which]) / self.scale[which]
            if not fits.any():
                return Found(found.splits, tuple(now.tolist()), totals)
            ratio = np.where(fits, gain, 0) / np.where(fits, use, 1)
            edge, option = np.unravel_index(ratio.argmax(), ratio.shape)
            now[edge] = option
            totals = totals + change[:, edge, option]


def _without(
    states: Mapping[tuple[str, ...], tuple[float, Trail]], place: int
) -> dict[tuple[str, ...], tuple[float, Trail]]:
    """The best of the states that differ only there."""
    best: dict[tuple[str, ...], tuple[float, Trail]] = {}
    for key, state in states.items():
        rest = key[:place] + key[place + 1 :]
        if rest not in best or state[0] < best[rest][0]:
            best[rest] = state
    return best
