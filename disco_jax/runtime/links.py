"""Measures the links between nodes."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from disco_jax.cost import Link, Links
from disco_jax.errors import require
from disco_jax.mesh import NODE, NodeMesh

SMALL, MEDIUM, LARGE = 64, 20_000, 100_000  # bytes; the last is the usual message_bytes
WORK = 192  # size of the matrices that a node multiplies between messages
FEW, MANY = 2, 18  # such products, between which the jitter is seen

Run = Callable[[], Any]


def measure_links(mesh: NodeMesh, repeats: int = 15) -> Links:
    """α, β, burst and jitter of the links, all nodes sending at once, as in a hop of an exchange.

    Nodes wait for each other at every message, so that all links of a hop get what its slowest one
    takes. A message counts as what it adds to a computation, as in a model: between nodes that do
    nothing else threads and caches have gone to sleep. α is what a small one takes after little
    work, and what it takes more after much is jitter; large ones without a pause between them find
    β; a medium and a large one, after so much work that a token bucket is full again, find the rate
    and the size of the burst, which is at most 100 kB.

    Raises:
      DiscoError: if the nodes are emulated, or there is only one, or several copies of them.
    """
    check_links(mesh)
    links: dict[tuple[int, int], Link] = {}
    for offset in range(1, mesh.nodes):
        link = _measure_hop(mesh, offset, repeats)
        links |= {(source, (source + offset) % mesh.nodes): link for source in range(mesh.nodes)}
    return Links(links[0, 1], links)


def check_links(mesh: NodeMesh) -> None:
    """Refuses nodes without links between them, with a DiscoError."""
    require(
        mesh.distributed and mesh.data == 1,
        f"`mesh` (={mesh}) has no links to measure; take data=1 and at least two nodes with a "
        "device for each",
    )


def _measure_hop(mesh: NodeMesh, offset: int, repeats: int) -> Link:
    program = cache(partial(_rounds, mesh, offset))

    def busy(messages: int, repeats: int) -> float:
        """What a large message adds to others on a link that never rests."""
        more, few = program(LARGE, messages + 2, 0), program(LARGE, 2, 0)
        return max(1e-9, _slower(more, few, repeats, mesh) / messages)

    def rested(size: int) -> float:
        """What a message takes more than a small one, with ``work`` before each."""
        sending, small = (program(s, messages, work) for s in (size, SMALL))
        return _slower(sending, small, repeats, mesh) / messages

    def late(work: int) -> float:
        """What a small message takes after so much work."""
        return _slower(program(SMALL, 20, work), program(0, 20, work), repeats, mesh) / 20

    product = max(1e-6, _slower(program(0, 1, 101), program(0, 1, 1), 5, mesh) / 100)
    few = late(FEW)
    jitter = float(np.clip((late(MANY) - few) / ((MANY - FEW) * product), 0, 1))
    latency = few - jitter * FEW * product
    about = busy(8, 3)
    enough = int(np.clip(0.05 / about, 8, 64))  # messages for 50 ms
    repeats = int(np.clip(10 / enough / about, 3, repeats))  # and not more than 10 s
    messages, work = int(np.clip(0.1 / about, 4, 20)), math.ceil(about / max(1e-5, product))
    link = _link(latency, busy(enough, repeats), rested(MEDIUM), rested(LARGE))
    return dataclasses.replace(link, jitter=jitter)


def _link(latency: float, busy: float, medium: float, large: float) -> Link:
    """A link from the seconds that messages take: see :func:`measure_links`.

    Where there is a bucket it fills while nodes prepare the next message, so that β is that of all
    the time between messages. A burst of what passes in two latencies cannot be told from none.

    >>> _link(latency=1e-4, busy=8e-3, medium=2e-4, large=4e-3)
    Link(mbit=100.0, ms=0.1, burst=50000.0, peak_mbit=800.0, jitter=0.0)
    >>> _link(latency=1e-3, busy=9e-3, medium=1.6e-3, large=8e-3)
    Link(mbit=100.0, ms=1.0, burst=0.0, peak_mbit=inf, jitter=0.0)
    """
    latency = max(0.0, latency)
    rate = LARGE / busy
    burst = min(LARGE - large * rate, LARGE)
    if burst <= 2 * latency * rate:
        rate = LARGE / max(1e-9, busy - latency)
        return Link(mbit=8e-6 * rate, ms=1e3 * latency)
    peak = max(rate, MEDIUM / max(1e-6, medium))
    return Link(8e-6 * rate, 1e3 * latency, burst, 8e-6 * peak)


def _rounds(mesh: NodeMesh, offset: int, size: int, messages: int, work: int) -> Run:
    """A program that sends so many bytes from every node, as often as there are messages.

    A first message makes the nodes start together. Before every other each multiplies ``work``
    matrices, by one that averages, so that numbers stay what they are.
    """
    hop = [(s, (s + offset) % mesh.nodes) for s in range(mesh.nodes)]

    def send(x: jax.Array, size: int) -> jax.Array:
        return x.at[:, :size].set(jax.lax.ppermute(x[:, :size] + 1, NODE, hop))

    def on_node(x: jax.Array) -> jax.Array:
        x = send(x, SMALL)
        product = average = jnp.full((WORK, WORK), 1 / WORK) + 1e-9 * x[0, 0]  # not a constant
        for _ in range(messages):
            product = product + 1e-9 * x[0, 0].astype(jnp.float32)
            product = jax.lax.fori_loop(0, work, lambda _, p: p @ average, product)
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


def _slower(first: Run, second: Run, repeats: int, mesh: NodeMesh) -> float:
    """How many seconds longer the first takes, at the node where that is most; they take turns."""
    mine = statistics.median(median(first, 1) - median(second, 1) for _ in range(repeats))
    return float(of_nodes(mine, mesh).max())


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
