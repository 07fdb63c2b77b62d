"""What one node of a packed model does, without the others: to measure its computation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from disco_jax import wire
from disco_jax.exchange import Local, Parts, Reader
from disco_jax.mesh import NODE, NodeMesh
from disco_jax.messages import Pairs
from disco_jax.packed import PackedExchange
from disco_jax.plan.frozen import Frozen, Program
from disco_jax.readable import Readable, ReadableRows
from disco_jax.repartition import RowsToChannels
from disco_jax.rows import RowReader
from disco_jax.trace import modules, replace


class Loopback(Reader):
    """One node's end of a packed exchange: it receives, at once, as much as it sends."""

    def __init__(self, like: PackedExchange, node: int, mesh: NodeMesh):
        super().__init__(like.channels // like.mesh.nodes, mesh=mesh)
        self.wire_dtype = like.wire_dtype
        self.sends = tuple(tuple(hop.filled()[node].tolist()) for hop in like.hops)
        self.scale: nnx.Variable | None = nnx.data(None)
        if like.scale is not None:
            self.scale = nnx.Variable(_part(like.scale[...], 2, node, like.mesh)[:, :, 0])

    def __call__(self, x: Float[Array, "b ... c"]) -> Readable:
        readable, start = [x], 0
        scale = None if self.scale is None else self.scale[...]
        for sends in self.sends:
            stop = start + len(sends)
            out, back = (None, None) if scale is None else scale[:, :, start:stop]
            sent = jnp.take(x, np.array(sends), axis=-1)
            moved = _made(wire.encode(sent, self.wire_dtype, out))
            readable.append(wire.decode(moved, self.wire_dtype, sent, back))
            start = stop
        return Readable(jnp.concatenate(readable, -1), self.mesh, packed=True, source=id(self))


class LoopbackRows(nnx.Module):
    """One node's end of an exchange of rows, or from rows to channels."""

    def __init__(self, like: RowReader | RowsToChannels, node: int, mesh: NodeMesh):
        self.like, self.node, self.mesh = like, node, mesh
        self.split_axis = like.split_axis

    def __call__(self, x: Float[Array, "b ..."]) -> Readable:
        like, source = self.like, id(self)
        tables = [jnp.asarray(table[self.node]) for table in like.tables()]
        if isinstance(like, RowsToChannels):
            scale = None if like.scale is None else like.scale[...]
            values = like.on_node(x, tables, self.node, _made, scale)
            return Readable(values, self.mesh, packed=True, source=source)
        return ReadableRows(
            like.on_node(x, tables, self.node, _made),
            self.mesh,
            source=source,
            height=like.bands.height,
            reads=like.reads,
            node=self.node,
        )


def _made(encoded: Array, pairs: Pairs = ()) -> Array:
    """What travels is really made."""
    return jax.lax.optimization_barrier(encoded)


def share(frozen: Frozen, node: int) -> Program:
    """The program of one node alone, for this process's first device.

    Its result means nothing, for it never hears of the other nodes; its time is that of the node's
    computation.

    Args:
      frozen: a packed model, of which this process holds at least this node.
      node: which.
    """
    nodes = frozen.plan.nodes
    alone = NodeMesh(1, devices=jax.local_devices()[:1])
    model = nnx.clone(frozen.model)
    parts: dict[int, nnx.Module] = {}
    module: Any
    for _, module in modules(model):
        if isinstance(module, PackedExchange):
            parts[id(module)] = Loopback(module, node, alone)
        elif isinstance(module, RowReader | RowsToChannels):
            parts[id(module)] = LoopbackRows(module, node, alone)
    replace(model, parts)
    for _, module in modules(model):
        mesh = getattr(module, "mesh", None)
        for variable in vars(module).values():
            if isinstance(variable, nnx.Variable) and not isinstance(module, Loopback):
                variable.set_value(_cut(variable[...], node, nodes, mesh or frozen.mesh))
        if isinstance(module, Local | Parts):
            module.channels //= nodes  # its own are all that there are
        if mesh is not None:
            module.mesh = alone
    return Program(model)


def _cut(value: jax.Array, node: int, nodes: int, mesh: NodeMesh) -> Any:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = _cut(jax.random.key_data(value), node, nodes, mesh)
        return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(value))
    spec = tuple(getattr(value.sharding, "spec", ()))
    return _part(value, spec.index(NODE), node, mesh) if NODE in spec else _local(value)


def _part(value: jax.Array, axis: int, node: int, mesh: NodeMesh) -> Shaped[np.ndarray, "..."]:
    """A node's part of an array that the nodes share along ``axis``."""
    if not mesh.distributed:
        return np.split(np.asarray(value), mesh.nodes, axis)[node]
    size = value.shape[axis] // mesh.nodes
    shards = value.addressable_shards
    return next(np.asarray(s.data) for s in shards if (s.index[axis].start or 0) == node * size)


def _local(value: jax.Array) -> Shaped[np.ndarray, "..."]:
    return np.asarray(value.addressable_shards[0].data)
