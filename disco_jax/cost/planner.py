"""What every layer is split along and what crosses the link, under limits of time and memory."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table

from disco_jax import wire
from disco_jax.cost.link import Link, Links
from disco_jax.cost.options import Options, Prices, Worth
from disco_jax.cost.search import LOSS, SECONDS, WEIGHTS, Edge, Found, Search
from disco_jax.cost.units import CHANNELS, ROWS, Reading, Units, units
from disco_jax.errors import require
from disco_jax.plan.flow import flow
from disco_jax.plan.split import ASKED
from disco_jax.sparsify.calibrate import observe
from disco_jax.sparsify.quantise import wire_scales
from disco_jax.trace import Images, exchanges, readers

OBJECTIVES = {"ms": SECONDS, "memory": WEIGHTS, "loss": LOSS}
FRONT = 5  # limits of memory that a front has

Splits = tuple[tuple[int, ...], ...]  # what each unit may be split along


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one masked exchange sends.

    Attributes:
      density: share of the remote (node, channel) pairs.
      wire_dtype: how they travel.
      ms: what that takes on a link that is busy, the multiplications of its readers included.
      kept: share of the energy of what is read, own channels and rounding included.
    """

    density: float
    wire_dtype: str
    ms: float
    kept: float


@dataclasses.dataclass(frozen=True)
class Point:
    """What a plan takes and gives.

    Attributes:
      ms: latency as ``cost.predict`` counts it.
      memory: weights of a node, as a share of those of a node that works alone.
      kept: mean share of the energy that an exchange's readers read (geometric, over all exchanges;
        1 where rows bring all).
    """

    ms: float
    memory: float
    kept: float


@dataclasses.dataclass(frozen=True)
class Planned(Point):
    """What all layers are split along, and all exchanges send.

    Attributes:
      layers: that are split by rows.
      row_dtype: what rows travel in.
      choices: by path of the masked exchange.
      fixed_ms: results, and what no choice changes.
      alternatives: by name, the fastest if all layers are split one way, whatever the memory.
      front: the fastest of other limits of memory.

    ``rows`` and ``row_dtype`` go to ``dj.split``; ``rules`` to ``prune`` or ``sparse_exchange``;
    ``wire_rules`` to ``quantise`` or ``freeze``.
    """

    layers: tuple[str, ...]
    row_dtype: str | None
    choices: Mapping[str, Choice]
    fixed_ms: float
    alternatives: Mapping[str, Point] = dataclasses.field(default_factory=dict)
    front: tuple[Point, ...] = ()

    @property
    def rows(self) -> tuple[str, ...]:
        """Patterns of the layers that are split by rows."""
        return tuple(map(_only, self.layers))

    @property
    def rules(self) -> tuple[tuple[str, dict[str, float]], ...]:
        """The densities, an exchange a rule."""
        return tuple((_only(p), {"density": c.density}) for p, c in self.choices.items())

    @property
    def wire_rules(self) -> tuple[tuple[str, str], ...]:
        """The wire dtypes, an exchange a rule."""
        return tuple((_only(p), c.wire_dtype) for p, c in self.choices.items())

    def __str__(self) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(self._exchanges(), self._points())
            console.print(f"by rows, exactly: {', '.join(self.layers) or 'nothing'}")
        return capture.get()

    def _exchanges(self) -> Table:
        table = Table("exchange", "density", "wire", "kept", "ms")
        for path, c in self.choices.items():
            table.add_row(path, f"{c.density:.3f}", c.wire_dtype, f"{c.kept:.3f}", f"{c.ms:.3f}")
        return table

    def _points(self) -> Table:
        """This plan, what it was chosen over, and the front that it lies on."""
        table = Table("", "latency (ms)", "of the weights", "kept")
        rows: list[tuple[str, Point]] = [("planned", self), *self.alternatives.items()]
        rows += [(f"at most {p.memory:.2f}", p) for p in self.front]
        for name, p in rows:
            table.add_row(name, f"{p.ms:.2f}", f"{p.memory:.3f}", f"{p.kept:.3f}")
        return table


def plan_splits(
    model: nnx.Module,
    images: Images,
    links: Link | Links,
    *,
    gmacs: float,
    minimise: str = "ms",
    ms: float | None = None,
    memory: float | None = None,
    density: float = 0.0,
    rows: bool = True,
    wire_dtypes: Sequence[str] = ("int4", "int8", "float16"),
    row_dtype: str | None = "float16",
    examples: int = 1,
) -> Planned:
    """Splits, densities and wire dtypes: the least of one total under limits of the others.

    A layer that is split by rows reads all, exactly, and every node holds all of its weights; split
    by channels a node holds its share, and of an exchange with the best ``k`` columns in wire dtype
    ``d`` its readers see ``own + V(k) (1 - ε_d)`` of ``Σ w²``, less what rounding turns to noise
    (``ε_d = Σ (x̂ - x)² / Σ x²``). What comes through a network is the product of these shares, so
    their logarithms are added up: no layer falls silent for the sake of others.

    Units that have to be split alike (residual streams, and what lies between) are decided by
    dynamic programming, densities and wire dtypes with them; multipliers meet the limits.

    Args:
      model: a trained masked model whose masks are full.
      images: a few hundred images to measure rounding on, or their ``jax.ShapeDtypeStruct``: then
        rounding counts as that of positive halves of normal distributions up to 6 σ.
      links: between the nodes; in a hop the slowest counts.
      gmacs: multiplications per second of a node in 10⁹: of a profiled plan, ``macs_per_node /
        compute_ms / 1e6``.
      minimise: ``"ms"``, ``"memory"`` or ``"loss"``.
      ms: the latency to meet.
      memory: what a node may hold of the weights that a node alone would, as a share.
      density: every masked exchange is to keep at least what this density of it keeps in the finest
        of the wire dtypes. Layers that are split by rows, which keep all, do not make up for it.
      rows: whether layers may be split by rows.
      wire_dtypes: what channels may travel in.
      row_dtype: what rows travel in; None: as computed.
      examples: images that go through together.

    Raises:
      DiscoError: if the limits cannot be met, or an argument is none of those above.
    """
    _check(model, minimise, ms, memory, density, wire_dtypes)
    shape = jax.ShapeDtypeStruct((examples, *images.shape[1:]), images.dtype)
    prices = Prices(model, shape, Links.of(links), gmacs, row_dtype)
    noise = {d: rounding_noise(model, images, d) for d in wire_dtypes}
    space = _Space(units(model, flow(model, shape)), prices, _worth(model, noise), density)
    limits = space.limits(ms, memory)
    limits.pop(OBJECTIVES[minimise], None)
    splits = space.units.splits if rows else space.only(CHANNELS)
    found = space.least(splits, OBJECTIVES[minimise], limits)
    if found is None:
        space.refuse(splits, limits, {SECONDS: ms, WEIGHTS: memory})
    assert found is not None
    if not rows:
        return space.planned(found, {}, ())
    alternatives: dict[str, Point] = {}
    limits.pop(WEIGHTS, None)
    for name, split in (("channels only", CHANNELS), ("rows where there are any", ROWS)):
        other = space.least(space.only(split), SECONDS, limits)
        if other is not None:
            alternatives[name] = space.point(other)
    return space.planned(found, alternatives, space.front(splits))


class _Space:
    """All that may be chosen for a model."""

    def __init__(self, units: Units, prices: Prices, worth: Mapping[str, Worth], density: float):
        self.units, self.prices, self.worth = units, prices, worth
        self.fixed = np.array([prices.fixed(units), 0.0, 0.0])
        self.searches: dict[tuple[Splits, float], Search] = {}
        self.options: list[dict[tuple[int, int], Options]] = []
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

    def only(self, split: int) -> Splits:
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


def _check(
    model: nnx.Module,
    minimise: str,
    ms: float | None,
    memory: float | None,
    density: float,
    wire_dtypes: Sequence[str],
) -> None:
    require(
        minimise in OBJECTIVES,
        f"`minimise` (={minimise!r}) must be one of {', '.join(OBJECTIVES)}; choose one of these",
    )
    for dtype in wire_dtypes:
        wire.check_wire_dtype(dtype)
    for name, value in (("ms", ms), ("memory", memory)):
        require(
            value is None or value > 0, f"`{name}` (={value}) must be positive; None sets no limit"
        )
    require(
        0 <= density <= 1,
        f"`density` (={density}) must be between 0 and 1: the share of remote channels that is as "
        "good as what is wanted of every exchange; 0.2 is usual",
    )
    require(
        not hasattr(model, ASKED),
        f"`model` (={type(model).__name__}) is split by rows already; plan for the model before "
        "dj.split, which takes the plan's rows",
    )
    require(
        bool(exchanges(model)),
        f"`model` (={type(model).__name__}) has no masked exchange; pass a model made of disco_jax "
        "layers that is not frozen already",
    )


def _worth(model: nnx.Module, noise: Mapping[str, Mapping[str, float]]) -> dict[str, Worth]:
    """Of every exchange the columns' shares of ``Σ w²``."""
    found = readers(model)
    worth = {}
    for path, exchange in exchanges(model).items():
        kernels = [np.asarray(layer.kernel[...]) for _, layer in found[path]]
        columns = column_shares(kernels, exchange.mesh.nodes)
        worth[path] = Worth(columns, {dtype: noise[dtype][path] for dtype in noise})
    return worth


def column_shares(
    kernels: Sequence[Float[np.ndarray, "... c_in c_out"]], nodes: int
) -> Float[np.ndarray, "column"]:
    """Shares of ``Σ w²`` of the columns that may be sent, the best first.

    A column gives every node its best channel, of those left, of the node some places before.

    >>> column_shares([np.array([[1.0, 2.0], [3.0, 4.0]])], 2).round(3).tolist()
    [0.433]
    """
    squares = (np.square(k).reshape(-1, *k.shape[-2:]).sum(0) for k in kernels)
    each = [s.reshape(len(s), nodes, -1).sum(-1).T for s in squares]  # [node, channel]
    energy = np.sum(each, 0).reshape(nodes, nodes, -1)  # [reader, owner, channel]
    ranked, node = np.sort(energy)[..., ::-1], np.arange(nodes)
    hops = [ranked[node, (node - offset) % nodes].sum(0) for offset in range(1, nodes)]
    columns = np.concatenate([np.zeros(0), *hops])
    return np.sort(columns)[::-1] / max(energy.sum(), np.finfo(energy.dtype).tiny)


def rounding_noise(model: nnx.Module, images: Images, dtype: str) -> dict[str, float]:
    """Energy of what rounding changes as a share of what it is given, for every exchange."""
    paths = list(exchanges(model))
    if isinstance(images, jax.ShapeDtypeStruct):
        # Steps of 6 σ / (2^bits - 1), errors uniform within a step, and E x² = σ².
        levels = 2 ** wire.BITS[dtype] - 1
        noise = (6 / levels) ** 2 / 12 if wire.calibrated(dtype) else 0.0
        return dict.fromkeys(paths, noise)
    found = wire_scales(model, images, dict.fromkeys(paths, dtype))
    scales = jax.tree.map(jnp.asarray, found)

    def noise_of(inputs: dict[str, list[Array]]) -> dict[str, Array]:
        shares = {}
        for path, xs in inputs.items():
            x = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in xs])
            change = wire.rounded(x, dtype, scales.get(path)) - x
            shares[path] = jnp.sum(change**2) / jnp.maximum(jnp.sum(x**2), 1e-30)
        return shares

    return jax.tree.map(float, observe(model, noise_of)(model, images))


def _only(path: str) -> str:
    return f"^{re.escape(path)}$"
