"""Which node computes which channel: renumber channels so that strong connections become local."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from disco_jax.errors import require
from disco_jax.mesh import NodeMesh
from disco_jax.sparsify.channels import Channels, channel_orders
from disco_jax.trace import Images, exchanges, readers


@dataclasses.dataclass(frozen=True)
class Edge:
    """How strongly order ``source`` is connected to order ``target``: ``[c_in, c_out]``."""

    source: int
    target: int
    strength: Float[np.ndarray, "c_in c_out"]


def assign(model: nnx.Module, images: Images, *, restarts: int = 8, seed: int = 0) -> float:
    """Renumbers channels, in place, so that the weights within nodes hold as much as they can.

    An exact re-parametrisation: every kernel, norm and bias that meets a channel is renumbered with
    it, along residual streams as well, and the network computes what it did. Maximises the sum over
    layers of the share of ``Σ w²`` that connects channels of one node, by block coordinate ascent:
    for one order of channels, with all others fixed, the best balanced choice of nodes is a linear
    assignment problem, solved exactly. Layer placement before pruning is RePurpose (Farcas, Li,
    Bhardwaj & Marculescu 2020, arXiv 2008.08289), which renumbers layer by layer.

    Args:
      model: a masked model whose masks are still full.
      images: the input, or its ``jax.ShapeDtypeStruct``.
      restarts: random starts, beside the order that is there; the best result counts.
      seed: of the random starts.

    Returns:
      The mean share of a layer's ``Σ w²`` within nodes afterwards. Chance gives 1/nodes.

    Raises:
      DiscoError: if masks have been chosen already.
    """
    found = exchanges(model)
    for path, exchange in found.items():
        require(
            bool(np.array_equal(exchange.mask[...], exchange.full_mask())),
            f"`mask` of exchange {path!r} is not full; assign channels before masks are chosen",
        )
    mesh = next(iter(found.values())).mesh
    orders = _movable(model, channel_orders(model, images), mesh)
    edges = _edges(model, orders)
    if mesh.nodes == 1 or not edges:
        return 1.0
    nodes = _solve([o.size for o in orders], edges, mesh.nodes, restarts, seed)
    state = nnx.to_flat_state(nnx.state(model))
    variables = {".".join(map(str, path)): variable for path, variable in state}
    for order, owner in zip(orders, nodes, strict=True):
        renumber = np.argsort(owner, kind="stable")
        for name, axis in order.axes:
            value = variables[name][...]
            moved = jnp.take(value, renumber, axis=axis)
            variables[name].set_value(jax.device_put(moved, value.sharding))
    nnx.update(model, nnx.from_flat_state(state))
    return _local(nodes, edges) / len(edges)


def _movable(model: nnx.Module, orders: Sequence[Channels], mesh: NodeMesh) -> list[Channels]:
    """Orders of living channels, with weights, that the nodes share equally."""
    reading = [layer for layers in readers(model).values() for layer in layers]
    kernels = {f"{path}.kernel" for path, _ in reading}
    dead = {
        f"{path}.kernel"
        for path, layer in reading
        if getattr(layer, "out_features", 0) < layer.kernel.shape[-1]
        or layer.exchange.features < layer.exchange.channels
    }
    return [
        order
        for order in orders
        if order.size % mesh.nodes == 0
        and kernels & {name for name, _ in order.axes}
        and not dead & {name for name, _ in order.axes}
    ]


def _edges(model: nnx.Module, orders: Sequence[Channels]) -> list[Edge]:
    index = {axis: i for i, order in enumerate(orders) for axis in order.axes}
    edges = []
    for layers in readers(model).values():
        for path, layer in layers:
            kernel = np.asarray(layer.kernel[...], np.float64)
            ends = [index.get((f"{path}.kernel", kernel.ndim + axis)) for axis in (-2, -1)]
            if ends[0] is not None and ends[1] is not None:
                energy = np.square(kernel).reshape(-1, *kernel.shape[-2:]).sum(0)
                edges.append(Edge(ends[0], ends[1], energy / max(energy.sum(), 1e-30)))
    return edges


def _solve(
    sizes: Sequence[int], edges: Sequence[Edge], nodes: int, restarts: int, seed: int
) -> list[Int[np.ndarray, "channel"]]:
    """The owner of every channel of every order."""
    rng = np.random.default_rng(seed)
    blocks = [np.arange(size) // (size // nodes) for size in sizes]
    starts = [blocks, *([rng.permutation(b) for b in blocks] for _ in range(restarts))]
    return max((_ascend(start, edges, nodes) for start in starts), key=lambda o: _local(o, edges))


def _ascend(start: Sequence[Any], edges: Sequence[Edge], nodes: int) -> list[Any]:
    """Improves one order after another until none gets better."""
    owners, best = list(start), _local(start, edges)
    while True:
        before = best
        for i, owner in enumerate(owners):
            gain = np.zeros((len(owner), nodes))
            for edge in edges:
                if edge.target == i:
                    gain += edge.strength.T @ np.eye(nodes)[owners[edge.source]]
                if edge.source == i:
                    gain += edge.strength @ np.eye(nodes)[owners[edge.target]]
            slots = np.repeat(np.arange(nodes), len(owner) // nodes)
            _, chosen = linear_sum_assignment(gain[:, slots], maximize=True)
            after = _local([*owners[:i], slots[chosen], *owners[i + 1 :]], edges)
            if after > best:  # an order that reads itself is only approximated
                owners[i], best = slots[chosen], after
        if best <= before + 1e-9:
            return owners


def _local(owners: Sequence[Any], edges: Sequence[Edge]) -> float:
    """Strength within nodes."""
    return sum(
        float(e.strength[owners[e.source][:, None] == owners[e.target]].sum()) for e in edges
    )
