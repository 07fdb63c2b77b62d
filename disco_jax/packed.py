"""Packed exchanges (deployment): only the planned channels move."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from disco_jax import wire
from disco_jax.exchange import Reader
from disco_jax.mesh import NODE
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
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(source, destination) of every message."""
        n = len(self.sends)
        return tuple((s, (s + self.offset) % n) for s in range(n) if self.sends[s])

    def filled(self) -> Int[np.ndarray, "n width"]:
        """``sends`` as a table, filled up with channel 0."""
        return np.array([(*s, *[0] * (self.width - len(s))) for s in self.sends], np.int32)


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
    """Packed exchange (deployment): only the planned channels move, one ``ppermute`` per hop.

    A node's readable block is its own channels, then what each hop brought. Without hops nothing
    moves.
    """

    def __init__(self, like: Reader, hops: tuple[Hop, ...], wire_dtype: str):
        super().__init__(like.features, mesh=like.mesh, pad=True)
        self.name = like.name
        self.hops = hops
        self.wire_dtype = wire.check_wire_dtype(wire_dtype)

    def __call__(self, x: Float[Array, "b ... c"]) -> Readable:
        self._check(x)
        note(self, x)
        if self.hops:
            x = self._permute(x) if self.mesh.distributed else self._take(x)
        return Readable(x, self.mesh, packed=True, source=id(self))

    def _permute(self, x: Array) -> Array:
        spec = activation_spec(x.ndim, self.mesh)
        return jax.shard_map(
            lambda x, *tables: jnp.concatenate(
                [x, *(self._receive(x, h, t[0]) for h, t in zip(self.hops, tables, strict=True))],
                axis=-1,
            ),
            mesh=self.mesh.jax_mesh,
            in_specs=(spec, *[P(NODE)] * len(self.hops)),  # [b/data, ..., c/n], [1, width] a hop
            out_specs=spec,  # [b/data, ..., r]
        )(x, *(hop.filled() for hop in self.hops))

    def _receive(self, x: Array, hop: Hop, channels: Array) -> Array:
        sent = wire.encode(jnp.take(x, channels, axis=-1, mode="clip"), self.wire_dtype)
        return wire.decode(lax.ppermute(sent, NODE, hop.pairs), self.wire_dtype, x.dtype)

    def _take(self, x: Array) -> Array:
        nodes = self.mesh.nodes
        index = received_channels(self.hops, nodes, self.channels // nodes)
        sent = wire.encode(jnp.take(x, jnp.maximum(index, 0), axis=-1), self.wire_dtype)
        received = wire.decode(sent, self.wire_dtype, x.dtype)
        own = jnp.reshape(x, (*x.shape[:-1], nodes, -1))
        return jnp.reshape(jnp.concatenate([own, received], -1), (*x.shape[:-1], -1))
