"""Which densities and wire dtypes meet a latency at the least loss."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table

from disco_jax import wire
from disco_jax.cost.budget import Prices, price
from disco_jax.cost.link import Link, Links
from disco_jax.errors import require
from disco_jax.sparsify.budget import column_worth, relative
from disco_jax.sparsify.calibrate import observe
from disco_jax.sparsify.quantise import wire_scales
from disco_jax.sparsify.scores import l2
from disco_jax.trace import Images, exchanges, readers


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one exchange sends.

    Attributes:
      density: share of the remote (node, channel) pairs.
      wire_dtype: how they travel.
      ms: what that takes, the multiplications that read it included.
      kept: share of the energy of what is read, own channels and rounding included.
    """

    density: float
    wire_dtype: str
    ms: float
    kept: float


@dataclasses.dataclass(frozen=True)
class Planned:
    """What all exchanges send.

    Attributes:
      choices: by path of the exchange.
      fixed_ms: what a node computes of its own channels, and gathers.

    ``rules`` go to ``prune``, ``sparse_exchange`` or a config's ``sparse.rules``; ``wire_rules`` to
    ``quantise``, ``freeze`` or a config's ``wire_rules``.
    """

    choices: Mapping[str, Choice]
    fixed_ms: float

    @property
    def rules(self) -> tuple[tuple[str, dict[str, float]], ...]:
        """The densities, an exchange a rule."""
        return tuple((_only(p), {"density": c.density}) for p, c in self.choices.items())

    @property
    def wire_rules(self) -> tuple[tuple[str, str], ...]:
        """The wire dtypes, an exchange a rule."""
        return tuple((_only(p), c.wire_dtype) for p, c in self.choices.items())

    @property
    def ms(self) -> float:
        """The latency as ``cost.predict`` counts it, links that are always busy."""
        return self.fixed_ms + sum(c.ms for c in self.choices.values())

    def __str__(self) -> str:
        table = Table("exchange", "density", "wire", "kept", "ms")
        for path, c in self.choices.items():
            table.add_row(path, f"{c.density:.3f}", c.wire_dtype, f"{c.kept:.3f}", f"{c.ms:.3f}")
        table.add_section()
        table.add_row("own channels", "", "", "", f"{self.fixed_ms:.3f}")
        table.add_row("latency", "", "", "", f"{self.ms:.3f}")
        console = Console(width=100)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


def plan_latency(
    model: nnx.Module,
    images: Float[Array, "b ..."],
    ms: float,
    links: Link | Links,
    *,
    gmacs: float,
    wire_dtypes: Sequence[str] = ("int4", "int8", "float16"),
    examples: int = 1,
    floor: float = 0.0,
) -> Planned:
    """Densities and wire dtypes that meet a latency at the least loss of energy.

    Of an exchange with the best ``k`` columns in wire dtype ``d`` its readers see the share
    ``own + V(k) (1 - ε_d)`` of ``Σ w²``, less what rounding turns to noise
    (``ε_d = Σ (x̂ - x)² / Σ x²``, measured). What comes through a network is the product of these
    shares, so the sum of their logarithms is maximised: no layer falls silent for the sake of
    others. One Lagrange multiplier, the worth of a second, decides
    for all exchanges (a multiple-choice knapsack; Sinha & Zoltners 1979); what its steps leave over
    is spent by the ratio of worth to time.

    Args:
      model: a trained masked model whose masks are full.
      images: a few hundred images to calibrate on.
      ms: the latency to meet.
      links: between the nodes; in a hop the slowest counts.
      gmacs: multiplications per second of a node in 10⁹; see :func:`latency_budget`.
      wire_dtypes: what may travel.
      examples: images that go through together.
      floor: density that every exchange keeps.

    Raises:
      DiscoError: if the nodes cannot compute their own shares, with the floor, in that time.
    """
    found = exchanges(model)
    shape = jax.ShapeDtypeStruct((examples, *images.shape[1:]), images.dtype)
    prices = price(model, shape, links, gmacs=gmacs)
    worth, own = _worth(model)
    noise = {d: _noise(model, images, d) for d in wire_dtypes}
    for dtype in wire_dtypes:
        wire.check_wire_dtype(dtype)
    options = {
        p: [_Option.of(p, d, worth[p], own[p], noise[d][p], prices, floor) for d in wire_dtypes]
        for p in found
    }
    left = prices.left_of(ms)
    least = sum(min(o.seconds[0] for o in each) for each in options.values())
    require(
        least <= left,
        f"`floor` (={floor}) takes {1e3 * least:.1f} ms, but of `ms` (={ms}) only "
        f"{1e3 * left:.1f} ms are left for remote channels; lower it, or allow more time",
    )
    chosen = _fill(options, _solve(options, left), left)
    return Planned(
        {
            path: Choice(
                option.counts[i] / max(1, len(worth[path])),
                option.wire_dtype,
                1e3 * float(option.seconds[i]),
                float(np.exp(option.worth[i])),
            )
            for path, (option, i) in chosen.items()
        },
        1e3 * prices.fixed,
    )


@dataclasses.dataclass(frozen=True)
class _Option:
    """One wire dtype of one exchange: what every number of columns is worth, and takes."""

    wire_dtype: str
    counts: np.ndarray  # int[k]
    worth: np.ndarray  # float[k], logarithms
    seconds: np.ndarray  # float[k]

    @classmethod
    def of(
        cls,
        path: str,
        dtype: str,
        columns: np.ndarray,
        own: float,
        noise: float,
        prices: Prices,
        floor: float,
    ) -> _Option:
        first = int(np.ceil(floor * len(columns) - 1e-3))
        counts = np.arange(first, len(columns) + 1)
        sums = np.concatenate([[0.0], np.cumsum(columns)])[counts]
        hops = prices.nodes - 1  # over which the columns are spread
        seconds = counts * (wire.BITS[dtype] / 8 * prices.byte[path] + prices.macs[path])
        seconds += prices.hop * prices.calls[path] * np.minimum(counts, hops)
        return cls(dtype, counts, np.log(own + sums * (1 - noise)), seconds)


_Chosen = dict[str, tuple[_Option, int]]


def _solve(options: Mapping[str, Sequence[_Option]], left: float) -> _Chosen:
    """The choice of every exchange at the lowest price of a second that the budget pays."""

    def at(price_of_second: float) -> _Chosen:
        return {path: _best(each, price_of_second) for path, each in options.items()}

    low, high = -40.0, 40.0  # of the price's logarithm
    for _ in range(60):
        middle = (low + high) / 2
        if _seconds(at(np.exp(middle))) > left:
            low = middle
        else:
            high = middle
    return at(np.exp(high))


def _best(options: Sequence[_Option], price_of_second: float) -> tuple[_Option, int]:
    gains = [o.worth - price_of_second * o.seconds for o in options]
    which = max(range(len(options)), key=lambda i: gains[i].max())
    return options[which], int(gains[which].argmax())


def _fill(options: Mapping[str, Sequence[_Option]], chosen: _Chosen, left: float) -> _Chosen:
    """Spends what is left over on whatever improves an exchange most per second."""
    left -= _seconds(chosen)
    while True:
        best, ratio = None, 0.0
        for path, (option, i) in chosen.items():
            for other in options[path]:
                gain = other.worth - option.worth[i]
                cost = other.seconds - option.seconds[i]
                fits = (gain > 1e-9) & (cost <= left)
                ratios = np.where(fits, gain / np.maximum(cost, 1e-12), 0.0)
                if ratios.max() > ratio:
                    ratio, best = ratios.max(), (path, other, int(ratios.argmax()))
        if best is None:
            return chosen
        path, option, i = best
        left -= option.seconds[i] - chosen[path][0].seconds[chosen[path][1]]
        chosen = {**chosen, path: (option, i)}


def _seconds(chosen: _Chosen) -> float:
    return sum(float(option.seconds[i]) for option, i in chosen.values())


def _worth(model: nnx.Module) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Of every exchange the columns' shares of ``Σ w²``, the best first, and that of own ones."""
    columns, own = {}, {}
    for path, layers in readers(model).items():
        nodes = layers[0][1].mesh.nodes
        scores = l2([layer.kernel[...] for _, layer in layers], nodes)
        shares = relative({path: scores})[path]
        columns[path] = np.sort(np.asarray(column_worth(shares)).ravel())[::-1]
        own[path] = max(1e-9, 1.0 - float(columns[path].sum()))
    return columns, own


def _noise(model: nnx.Module, images: Images, dtype: str) -> dict[str, float]:
    """Energy of what rounding changes as a share of what it is given, for every exchange."""
    found = wire_scales(model, images, dict.fromkeys(exchanges(model), dtype))
    scales = jax.tree.map(jnp.asarray, found)

    def noise(inputs: dict[str, list[Array]]) -> dict[str, Array]:
        shares = {}
        for path, xs in inputs.items():
            x = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in xs])
            change = wire.rounded(x, dtype, scales.get(path)) - x
            shares[path] = jnp.sum(change**2) / jnp.maximum(jnp.sum(x**2), 1e-30)
        return shares

    return jax.tree.map(float, observe(model, noise)(model, images))


def _only(path: str) -> str:
    return f"^{re.escape(path)}$"
