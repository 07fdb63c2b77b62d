"""Measures the links between nodes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from disco_jax.cost import Link, Links
from disco_jax.errors import require
from disco_jax.mesh import NODE, NodeMesh

SMALL, MEDIUM, LARGE = 64, 20_000, 100_000  # bytes of the messages; see plan.freeze
WORK = 512  # size of the matrices that a node multiplies between messages

Run = Callable[[], Any]


def measure_links(mesh: NodeMesh, repeats: int = 15) -> Links:
    """α and β of every link, where all nodes send at once, as in a hop of an exchange.

    A message counts as what it adds to a computation, as in a model: between nodes that do nothing
    else threads and caches have gone to sleep. α is what a small one takes. Large ones that follow
    each other without a pause find the rate; the burst and its peak rate are found by a large and a
    medium one after so much work that a token bucket is full again.

    Raises:
      DiscoError: if the nodes are emulated, or there is only one.
    """
    check_links(mesh)
    links = {}
    for offset in range(1, mesh.nodes):
        for target, link in enumerate(_measure_hop(mesh, offset, repeats)):
            links[(target - offset) % mesh.nodes, target] = link
    return Links(links[0, 1], links)


def check_links(mesh: NodeMesh) -> None:
    """Refuses nodes without links between them, with a DiscoError."""
    require(
        mesh.distributed,
        f"`mesh` (={mesh}) has no links; take at least two nodes with a device for each",
    )


def _measure_hop(mesh: NodeMesh, offset: int, repeats: int) -> list[Link]:
    """What each node receives from the one that is ``offset`` before it."""
    program = partial(_rounds, mesh, offset)

    def longer(first: Run, second: Run, repeats: int) -> Float[np.ndarray, "n"]:
        return of_nodes(_median_difference(first, second, repeats), mesh)

    def added(size: int, messages: int, work: int) -> Float[np.ndarray, "n"]:
        """What a message adds, at each node, to the work before it."""
        sending, working = (program(s, messages, work) for s in (size, 0))
        return longer(sending, working, repeats) / messages

    def busy(messages: int, repeats: int) -> Float[np.ndarray, "n"]:
        """What a message adds to others, on a link that never rests."""
        more, few = (program(LARGE, m, 0) for m in (messages + 2, 2))
        return np.maximum(1e-9, longer(more, few, repeats) / messages)

    latency = np.maximum(0.0, added(SMALL, 20, 1))
    enough = int(np.clip(0.05 / busy(8, 3).min(), 8, 64))  # for 50 ms
    rate = LARGE / np.maximum(1e-9, busy(enough, repeats) - latency)
    # Before each message as much work as a token bucket takes to be full again.
    full, product = LARGE / rate.min(), _seconds_of_work(mesh, offset)
    messages, work = int(np.clip(0.1 / full, 4, 20)), math.ceil(full / product)
    medium, large = (
        np.maximum(1e-9, added(size, messages, work) - latency) for size in (MEDIUM, LARGE)
    )
    peak = np.maximum.reduce([rate, MEDIUM / medium, LARGE / large])
    # large = burst / peak + (LARGE - burst) / rate
    burst = (LARGE / rate - large) / np.maximum(1e-15, 1 / rate - 1 / peak)
    found = 8e-6 * rate, 1e3 * latency, np.clip(burst, 0, LARGE), 8e-6 * peak
    return [Link(*map(float, link)) for link in zip(*found, strict=True)]


def _seconds_of_work(mesh: NodeMesh, offset: int) -> float:
    """What one piece of the work between messages takes, at the fastest node."""
    one, many = (_rounds(mesh, offset, 0, 1, work) for work in (1, 21))
    return float(of_nodes(_median_difference(many, one, 5) / 20, mesh).min())


def _rounds(mesh: NodeMesh, offset: int, size: int, messages: int, work: int) -> Run:
    """A program that sends so many bytes from every node, as often as there are messages.

    A first message makes the nodes start together. Before every other each multiplies ``work``
    matrices.
    """
    hop = [(s, (s + offset) % mesh.nodes) for s in range(mesh.nodes)]

    def send(x: jax.Array, size: int) -> jax.Array:
        return x.at[:, :size].set(jax.lax.ppermute(x[:, :size] + 1, NODE, hop))

    def on_node(x: jax.Array) -> jax.Array:
        product, x = jnp.full((WORK, WORK), 1 / WORK), send(x, SMALL)
        for _ in range(messages):
            product = product + 1e-9 * x[0, 0].astype(jnp.float32)
            product = jax.lax.fori_loop(0, work, lambda _, p: p @ p, product)
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


def _median_difference(first: Run, second: Callable[[], Any], repeats: int) -> float:
    """How much longer the first takes, in seconds; they take turns."""
    return statistics.median(median(first, 1) - median(second, 1) for _ in range(repeats))


def median(run: Run, iterations: int) -> float:
    """Median time in seconds of what has been compiled."""
    seconds = []
    for _ in range(iterations):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def of_nodes(value: float, mesh: NodeMesh) -> Float[np.ndarray, "n"]:
    """What each node's process has measured, on all of them."""
    own = mesh.sharding(None, NODE)
    shape = (1, mesh.nodes)
    values = jax.make_array_from_callback(shape, own, lambda i: np.full((1, 1), value, np.float32))
    return np.asarray(jax.jit(jnp.ravel, out_shardings=mesh.sharding())(values), np.float64)
