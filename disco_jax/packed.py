"""Packed exchanges (deployment): only the planned channels move."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from disco_jax import wire
from disco_jax.exchange import Reader, Scale
from disco_jax.mesh import NODE
from disco_jax.messages import Pairs, permute, ring
from disco_jax.partition import activation_spec
from disco_jax.readable import Readable, note


@dataclasses.dataclass(frozen=True)
class Hop:
    """One ring offset of a packed exchange: node ``s`` sends to node ``(s + offset) % n``.

    Attributes:
      offset: 1 ... n-1.
      sends: for each node the channels it sends, counted from its own first channel. A node
        with fewer channels than the widest sends fill, which no kernel reads; a node with none
        sends nothing.
    """

    offset: int
    sends: tuple[tuple[int, ...], ...]

    @property
    def width(self) -> int:
        """Channels that every sending node moves, fill included."""
        return max(map(len, self.sends))

    @property
    def pairs(self) -> Pairs:
        """(source, destination) of every message."""
        return tuple(pair for pair in ring(len(self.sends), self.offset) if self.sends[pair[0]])

    def filled(self) -> Int[np.ndarray, "n width"]:
        """``sends`` as a table, filled up with channel 0."""
        return np.array([(*s, *[0] * (self.width - len(s))) for s in self.sends], np.int32)


def split_hops(hops: tuple[Hop, ...], most: int | None) -> tuple[Hop, ...]:
    """The same messages in pieces of at most ``most`` channels; None: of any number.

    >>> split_hops((Hop(1, ((), (0, 1, 2))),), 2)
    (Hop(offset=1, sends=((), (0, 1))), Hop(offset=1, sends=((), (2,))))
    """
    if most is None:
        return hops
    return tuple(
        Hop(hop.offset, tuple(sent[i : i + most] for sent in hop.sends))
        for hop in hops
        for i in range(0, hop.width, most)
    )


def received_channels(hops: tuple[Hop, ...], nodes: int, block: int) -> Int[np.ndarray, "n m"]:
    """The global index of every channel that each node receives, -1 where a slot is fill.

    >>> received_channels((Hop(1, ((0,), (1,))),), nodes=2, block=2).tolist()
    [[3], [0]]
    """
    table = np.full((nodes, sum(hop.width for hop in hops)), -1, np.int32)
    start = 0
    for hop in hops:
        for source, target in hop.pairs:
            sent = hop.sends[source]
            table[target, start : start + len(sent)] = np.array(sent) + source * block
        start += hop.width
    return table


class PackedExchange(Reader):
    """Packed exchange (deployment): only the planned channels move, hop by hop.

    A node's readable block is its own channels, then what each hop brought. Without hops nothing
    moves. Where devices compute while messages are under way, the two parts stay apart, so that
    XLA can multiply own channels meanwhile; on CPUs one product of both is faster.

    Args:
      like: the exchange it replaces.
      hops: what moves.
      wire_dtype: how it moves.
      scale: lowest value and step of every channel, from ``wire.scale``; for integers.
    """

    def __init__(
        self,
        like: Reader,
        hops: tuple[Hop, ...],
        wire_dtype: str,
        scale: Float[np.ndarray, "2 c"] | None = None,
    ):
        super().__init__(like.features, mesh=like.mesh, pad=True, unit=like.unit)
        self.name = like.name
        self.hops = hops
        self.wire_dtype = wire.check_wire_dtype(wire_dtype)
        self.scale: Scale | None = nnx.data(None)
        if scale is not None and hops:
            block = self.channels // self.mesh.nodes
            first = np.arange(self.mesh.nodes)[:, None] * block
            sent = np.concatenate([hop.filled() + first for hop in hops], axis=1)
            received = np.maximum(received_channels(hops, self.mesh.nodes, block), 0)
            ends = np.stack([scale[:, sent], scale[:, received]])  # [2, 2, node, channel]
            self.scale = Scale(self.mesh.put(ends, None, None, NODE))

    def __call__(self, x: Float[Array, "b ... c"]) -> Readable:
        self._check(x)
        note(self, x)
        received = None
        if self.hops and self.mesh.overlaps:
            received = self._permute(x, self._receive)
        elif self.hops:
            x = self._permute(x, self._readable) if self.mesh.distributed else self._take(x)
        return Readable(x, self.mesh, received=received, packed=True, source=id(self))

    def unit_size(self, shape: tuple[int, ...], positions: int) -> int:
        """Numbers of one channel that is sent, of a map of this shape."""
        return positions

    def _permute(self, x: Array, on_node: Callable[..., Array]) -> Array:
        spec = activation_spec(x.ndim, self.mesh)
        return jax.shard_map(
            on_node,
            mesh=self.mesh.jax_mesh,
            # [b/data, ..., c/n], [1, width] a hop, [2, 2, 1, channels]
            in_specs=(spec, P(NODE), P(None, None, NODE)),
            out_specs=spec,  # [b/data, ..., r] or [b/data, ..., m]
        )(x, [jnp.asarray(hop.filled()) for hop in self.hops], self._scale)

    def _readable(self, x: Array, tables: list[Array], scale: Array | None) -> Array:
        return jnp.concatenate([x, self._receive(x, tables, scale)], axis=-1)

    def _receive(self, x: Array, tables: list[Array], scale: Array | None) -> Array:
        received, start = [], 0
        for hop, table in zip(self.hops, tables, strict=True):
            stop = start + hop.width
            out, back = (None, None) if scale is None else scale[:, :, 0, start:stop]
            sent = jnp.take(x, table[0], axis=-1, mode="clip")
            moved = permute(wire.encode(sent, self.wire_dtype, out), hop.pairs)
            received.append(wire.decode(moved, self.wire_dtype, sent, back))
            start = stop
        return jnp.concatenate(received, axis=-1)

    def _take(self, x: Array) -> Array:
        nodes = self.mesh.nodes
        index = received_channels(self.hops, nodes, self.channels // nodes)
        scale = None if self._scale is None else self._scale[1]
        sent = jnp.take(x, jnp.maximum(index, 0), axis=-1)
        received = wire.arrived(sent, self.wire_dtype, scale)
        own = jnp.reshape(x, (*x.shape[:-1], nodes, -1))
        return jnp.reshape(jnp.concatenate([own, received], -1), (*x.shape[:-1], -1))

    @property
    def _scale(self) -> Array | None:
        return None if self.scale is None else self.scale[...]
