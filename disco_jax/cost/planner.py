"""What every layer is split along and what crosses the link, under limits of time and memory."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from disco_jax import wire
from disco_jax.cost.link import Link, Links
from disco_jax.cost.options import Prices
from disco_jax.cost.planned import Planned, Point
from disco_jax.cost.search import LOSS, SECONDS, WEIGHTS
from disco_jax.cost.space import Space
from disco_jax.cost.units import units
from disco_jax.cost.worth import worths
from disco_jax.errors import require
from disco_jax.plan.flow import flow
from disco_jax.plan.split import ASKED, CHANNELS, ROWS
from disco_jax.trace import Images, exchanges

OBJECTIVES = {"ms": SECONDS, "memory": WEIGHTS, "loss": LOSS}


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
    worth = worths(model, images, wire_dtypes)
    space = Space(units(model, flow(model, shape)), prices, worth, density)
    limits = space.limits(ms, memory)
    limits.pop(OBJECTIVES[minimise], None)
    splits = space.units.splits if rows else space.only(CHANNELS)
    found = space.least(splits, OBJECTIVES[minimise], limits)
    if found is None:
        space.refuse(splits, limits, {SECONDS: ms, WEIGHTS: memory})
    assert found is not None
    if not rows:
        return space.planned(found, {}, ())
    alternatives = {"one node alone": Point(1e3 * prices.alone, 1.0, 1.0)}
    limits.pop(WEIGHTS, None)
    for name, split in (("channels only", CHANNELS), ("rows where there are any", ROWS)):
        other = space.least(space.only(split), SECONDS, limits)
        if other is not None:
            alternatives[name] = space.point(other)
    return space.planned(found, alternatives, space.front(splits))


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
