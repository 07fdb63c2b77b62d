"""Measures nodes and links, and holds a plan's predicted latency against the real one."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table

from disco_jax.cost import Links, Prediction, predict
from disco_jax.mesh import NodeMesh
from disco_jax.messages import limited
from disco_jax.packed import PackedExchange
from disco_jax.partition import activation_spec
from disco_jax.plan import Frozen, share
from disco_jax.runtime.links import Run, check_links, measure_links, median, of_nodes
from disco_jax.trace import modules


@dataclasses.dataclass(frozen=True)
class Profile:
    """What was measured of nodes and links, and of a plan on them.

    Attributes:
      links: latency, rate and burst between the nodes.
      compute_ms: what the slowest node computes.
      predicted: latency from plan, links and computation.
      measured_ms: latency of the packed model.
      exchanges_ms: what each exchange takes alone, encoding and dispatch included.
    """

    links: Links
    compute_ms: float
    predicted: Prediction
    measured_ms: float
    exchanges_ms: dict[str, float]

    def __str__(self) -> str:
        links = Table("link", "latency (ms)", "rate (Mbit/s)", "burst (bytes)", "burst rate")
        for (a, b), link in sorted(self.links.pairs.items()):
            numbers = f"{link.ms:.3f}", f"{link.mbit:.1f}", f"{link.burst:,.0f}"
            links.add_row(f"{a} > {b}", *numbers, f"{link.peak_mbit:.1f}")
        times = Table("", "bytes", "predicted (ms)", "measured (ms)")
        for e in self.predicted.exchanges:
            alone = self.exchanges_ms.get(e.path)
            shown = "-" if alone is None else f"{alone:.3f}"
            times.add_row(e.path, f"{e.traffic_bytes:,}", f"{e.ms:.3f}", shown)
        times.add_section()
        times.add_row("computation", "", "", f"{self.compute_ms:.3f}")
        error = f"{100 * (self.predicted.ms / self.measured_ms - 1):+.1f} %"
        times.add_row("latency", error, f"{self.predicted.ms:.3f}", f"{self.measured_ms:.3f}")
        console = Console(width=100)
        with console.capture() as capture:
            console.print(links, times)
        return capture.get()


def profile(frozen: Frozen, images: Float[Array, "b ..."], *, iterations: int = 20) -> Profile:
    """Measures links, computation and latency; on several hosts all call it at the same time.

    Args:
      frozen: a packed model on real nodes.
      images: what it is to run, one example most often.
      iterations: of which the median counts.

    Raises:
      DiscoError: if the model is emulated, so that there are no links.
    """
    check_links(frozen.mesh)
    compute = compute_ms(frozen, images, iterations)
    links = measure_links(frozen.mesh)
    return Profile(
        links,
        compute,
        predict(frozen.plan, links, compute_ms=compute, examples=len(images)),
        _measure(lambda: frozen(images), iterations, frozen.mesh),
        exchange_ms(frozen, len(images), iterations),
    )


def compute_ms(frozen: Frozen, images: Any, iterations: int = 20) -> float:
    """Median time of the slowest node's own computation, without any link."""
    mesh = frozen.mesh
    here = [d.process_index == jax.process_index() for d in mesh.jax_mesh.devices[0]]
    mine = []
    for node in np.flatnonzero(here).tolist():
        alone = share(frozen, node)
        jax.block_until_ready(alone(images))
        mine.append(1e3 * median(partial(alone, images), iterations))
    return _slowest(max(mine), mesh)


def exchange_ms(frozen: Frozen, examples: int = 1, iterations: int = 20) -> dict[str, float]:
    """Median time of each packed exchange by itself, all calls together."""
    found: dict[str, float] = {}
    for path, exchange in modules(frozen.model):
        if not isinstance(exchange, PackedExchange) or not exchange.hops:
            continue
        graphdef, state = nnx.split(exchange)
        run = jax.jit(lambda state, x, graphdef=graphdef: nnx.merge(graphdef, state)(x).values)
        calls = next(e.positions for e in frozen.plan.exchanges if e.path == path)
        found[path] = 0.0
        for positions in calls:
            shape = (examples, positions, exchange.channels)
            spec = activation_spec(len(shape), frozen.mesh)
            x = frozen.mesh.put(np.zeros(shape, np.float32), *spec)
            with limited(frozen.plan.message_bytes, examples // frozen.mesh.data):
                found[path] += _measure(partial(run, state, x), iterations, frozen.mesh)
    return found


def _measure(run: Run, iterations: int, mesh: NodeMesh) -> float:
    """Median time in ms of something that has been compiled, or is now, at the slowest node."""
    jax.block_until_ready(run())
    return _slowest(1e3 * median(run, iterations), mesh)


def _slowest(value: float, mesh: NodeMesh) -> float:
    """The largest of what the nodes' processes have measured, on all of them."""
    return float(of_nodes(value, mesh).max())
