"""Measures nodes and links, and holds a plan's predicted latency against the real one."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table

from disco_jax.cost import Link, Links, Prediction, predict
from disco_jax.errors import require
from disco_jax.mesh import NODE, NodeMesh
from disco_jax.packed import PackedExchange
from disco_jax.partition import activation_spec
from disco_jax.plan import Frozen, share
from disco_jax.trace import modules

SMALL, LARGE = 64, 100_000  # bytes of the messages that tell α and β apart; see plan.freeze
IDLE = 0.2  # seconds after which a token bucket is full again
WORK = 512  # size of the products that a node computes between messages


@dataclasses.dataclass(frozen=True)
class Profile:
    """What was measured of nodes and links, and of a plan on them.

    Attributes:
      links: α and β between the nodes.
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
        links = Table("link", "latency (ms)", "rate (Mbit/s)", "burst (bytes)")
        for (a, b), link in sorted(self.links.pairs.items()):
            links.add_row(f"{a} > {b}", f"{link.ms:.3f}", f"{link.mbit:.1f}", f"{link.burst:,.0f}")
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
    _check_links(frozen.mesh)
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
        mine.append(1e3 * _median(partial(alone, images), iterations))
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
            found[path] += _measure(partial(run, state, x), iterations, frozen.mesh)
    return found


def measure_links(mesh: NodeMesh, repeats: int = 9) -> Links:
    """α and β of every link, where all nodes send at once, as in a hop of an exchange.

    A single message counts as what it adds to a computation, as in a model: between nodes that do
    nothing else threads and caches have gone to sleep. α is what a small one takes; large ones that
    follow each other without a pause find the rate, a single large one after a pause the burst.

    Raises:
      DiscoError: if the nodes are emulated, or there is only one.
    """
    _check_links(mesh)
    links = {}
    for offset in range(1, mesh.nodes):
        for target, link in enumerate(_measure_hop(mesh, offset, repeats)):
            links[(target - offset) % mesh.nodes, target] = link
    return Links(links[0, 1], links)


def _check_links(mesh: NodeMesh) -> None:
    require(
        mesh.distributed,
        f"`mesh` (={mesh}) has no links; take at least two nodes with a device for each",
    )


def _measure_hop(mesh: NodeMesh, offset: int, repeats: int) -> list[Link]:
    """What each node receives from the one that is ``offset`` before it."""

    def added(sizes: Sequence[int], work: int, repeats: int, pause: float) -> np.ndarray:
        """Median of what messages add to the work between them, at each node."""
        nothing = (0,) * len(sizes)
        sending, alone = (_rounds(mesh, offset, s, work) for s in (sizes, nothing))
        times = [(_median(sending, 1, pause), _median(alone, 1, pause)) for _ in range(repeats)]
        return _of_nodes(statistics.median(with_ - without for with_, without in times), mesh)

    latency = np.maximum(0.0, added((SMALL,) * 20, 1, 3 * repeats, 0.0) / 20)
    single = added((LARGE,), 2, 2 * repeats, IDLE)
    # For 50 ms, where the links are fast.
    more = int(np.clip(0.05 / max(single.max(), 1e-9), 8, 64))
    many = added((LARGE,) * (1 + more), 0, repeats, IDLE)
    rate = LARGE / np.maximum(1e-9, (many - single) / more - latency)
    burst = np.clip(LARGE - (single - latency) * rate, 0, LARGE)
    return [Link(*map(float, link)) for link in zip(8e-6 * rate, 1e3 * latency, burst, strict=True)]


def _rounds(mesh: NodeMesh, offset: int, sizes: Sequence[int], work: int) -> Callable[[], Any]:
    """A program that sends so many bytes from every node, one message after another.

    A first message makes the nodes start together. Before every other each multiplies ``work``
    matrices.
    """
    hop = [(s, (s + offset) % mesh.nodes) for s in range(mesh.nodes)]

    def send(x: jax.Array, size: int) -> jax.Array:
        return x.at[:, :size].set(jax.lax.ppermute(x[:, :size] + 1, NODE, hop))

    def on_node(x: jax.Array) -> jax.Array:
        product, x = jnp.full((WORK, WORK), 1 / WORK), send(x, SMALL)
        for size in sizes:
            for _ in range(work):
                product = product @ product + 1e-9 * x[0, 0].astype(jnp.float32)
            x = x + product[0, 0].astype(x.dtype)
            x = send(x, size) if size else x
        return x

    run = jax.jit(
        jax.shard_map(
            on_node,
            mesh=mesh.jax_mesh,
            in_specs=P(None, NODE),  # [1, LARGE]
            out_specs=P(None, NODE),  # [1, LARGE]
        )
    )
    x = mesh.put(np.zeros((1, LARGE * mesh.nodes), np.int8), None, NODE)
    jax.block_until_ready(run(x))
    return lambda: run(x)


def _median(run: Callable[[], Any], iterations: int, pause: float = 0.0) -> float:
    seconds = []
    for _ in range(iterations):
        time.sleep(pause)
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _measure(run: Callable[[], Any], iterations: int, mesh: NodeMesh) -> float:
    """Median time in ms of something that has been compiled, or is now, at the slowest node."""
    jax.block_until_ready(run())
    return _slowest(1e3 * _median(run, iterations), mesh)


def _slowest(value: float, mesh: NodeMesh) -> float:
    """The largest of what the nodes' processes have measured, on all of them."""
    return float(_of_nodes(value, mesh).max())


def _of_nodes(value: float, mesh: NodeMesh) -> Float[np.ndarray, "n"]:
    """What each node's process has measured, on all of them."""
    own = mesh.sharding(None, NODE)
    shape = (1, mesh.nodes)
    values = jax.make_array_from_callback(shape, own, lambda i: np.full((1, 1), value, np.float32))
    return np.asarray(jax.jit(jnp.ravel, out_shardings=mesh.sharding())(values), np.float64)
