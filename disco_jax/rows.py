"""Exchanges of maps that are split by rows: halos, and what lies between rows and channels.

Split by rows (Mao et al. 2017, MoDNN; Zhao et al. 2018, DeepThings) a layer computes what it would
on one node: a node holds all of its weights, and reads its own rows and a few of its neighbours'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from disco_jax import wire
from disco_jax.bands import Bands, Reads, block_rows, row_messages
from disco_jax.exchange import Reader, Scale
from disco_jax.mesh import NODE
from disco_jax.packed import Hop
from disco_jax.partition import activation_spec, batch_spec, owned, row_spec
from disco_jax.readable import Readable, ReadableRows, note


class RowReader(Reader):
    """What gives every node the rows that it reads; the subclasses say where these are.

    Args:
      like: the reader it replaces.
      height: rows of the map.
      reads: which of them each node reads, all readers of the map together.
      fill: what rows of padding hold.
      wire_dtype: how rows move; own rows are read as they were computed.
      scale: lowest value and step of every channel, from ``wire.scale``; for integers.
    """

    split_axis = None  # every node computes all channels of its rows

    def __init__(
        self,
        like: Reader,
        height: int,
        reads: Reads,
        *,
        fill: float = 0.0,
        wire_dtype: str = "float32",
        scale: Float[np.ndarray, "2 c"] | None = None,
    ):
        super().__init__(like.features, mesh=like.mesh, pad=True, unit=like.unit)
        self.channels = like.channels
        self.name = like.name
        self.height, self.reads, self.fill = height, reads, fill
        self.wire_dtype = wire.check_wire_dtype(wire_dtype)
        self.scale = nnx.data(None if scale is None else Scale(self.mesh.put(scale)))
        self.hops = self._plan()

    @property
    def bands(self) -> Bands:
        """Who owns which rows of the map."""
        return Bands(self.height, self.mesh.nodes)

    def _plan(self) -> tuple[Hop, ...]:
        """What moves; of a hop's ``sends`` the numbers are rows, counted from a node's first."""
        raise NotImplementedError

    def _rows(self, x: Float[Array, "b h ... c"]) -> Float[Array, "b n*count ... c"]:
        raise NotImplementedError

    def __call__(self, x: Float[Array, "b h ... c"]) -> ReadableRows:
        self._check(x)
        note(self, x)
        return ReadableRows(
            self._rows(x), self.mesh, source=id(self), height=self.height, reads=self.reads
        )

    def _move(self, sent: Array, hop: Hop, scale: Array | None) -> Array:
        """On a node: gives away what it has encoded, returns what it was given."""
        moved = lax.ppermute(wire.encode(sent, self.wire_dtype, scale), NODE, hop.pairs)
        return wire.decode(moved, self.wire_dtype, sent, scale)

    @property
    def _scale(self) -> Array | None:
        return None if self.scale is None else self.scale[...]

    @property
    def _tables(self) -> list[Array]:
        return [jnp.asarray(hop.filled()) for hop in self.hops]

    def _outside(self) -> Bool[np.ndarray, "n count"]:
        """The rows of every node's block that it does not need."""
        rows = np.add.outer(self.reads.first, np.arange(self.reads.count))
        needed = [np.isin(r, n) for r, n in zip(rows, self.reads.needed, strict=True)]
        return ~np.stack(needed)

    def _from_top(self, past: int) -> Int[np.ndarray, "n count"]:
        """The rows of every node's block, counted from the map's first; ``past`` has no row."""
        rows = np.add.outer(self.reads.first, np.arange(self.reads.count))
        return np.where(self._outside(), past, rows)

    def _take(self, x: Array, rows: Array | np.ndarray) -> Array:
        return jnp.take(x, rows, axis=1, mode="fill", fill_value=self.fill)


class ReplicatedRows(RowReader):
    """Every node holds the whole map, the images say, and reads its rows of it: nothing moves."""

    def _plan(self) -> tuple[Hop, ...]:
        return ()

    def _rows(self, x: Float[Array, "b h ... c"]) -> Float[Array, "b n*count ... c"]:
        table = self._from_top(self.height)
        if not self.mesh.distributed:
            return self._take(x, table.reshape(-1))
        return jax.shard_map(
            lambda x, rows: self._take(x, rows[0]),
            mesh=self.mesh.jax_mesh,
            in_specs=(batch_spec(x.ndim, self.mesh), P(NODE)),  # [b/data, h, ..., c], [1, count]
            out_specs=row_spec(x.ndim, self.mesh),  # [b/data, count, ..., c]
        )(x, jnp.asarray(table))


class HaloExchange(RowReader):
    """A node's own rows, and those beyond its band that it reads: ``[b, n*band, ..., c]``."""

    def _plan(self) -> tuple[Hop, ...]:
        offsets = range(1, self.mesh.nodes)
        hops = (Hop(o, row_messages(self.bands, self.reads, o)) for o in offsets)
        return tuple(hop for hop in hops if any(hop.sends))

    def _rows(self, x: Float[Array, "b h ... c"]) -> Float[Array, "b n*count ... c"]:
        if not self.mesh.distributed:
            return self._emulated(x)
        table = block_rows(self.bands, self.reads, [(h.offset, h.sends) for h in self.hops])
        spec = row_spec(x.ndim, self.mesh)

        def on_node(x: Array, sends: list[Array], table: Array, scale: Array | None) -> Array:
            found = [x]
            for hop, rows in zip(self.hops, sends, strict=True):
                sent = jnp.take(x, rows[0], axis=1, mode="clip")
                found.append(self._move(sent, hop, scale))
            return self._take(jnp.concatenate(found, 1), table[0])

        return jax.shard_map(
            on_node,
            mesh=self.mesh.jax_mesh,
            # [b/data, band, ..., c], [1, width] a hop, [1, count], [2, c]
            in_specs=(spec, P(NODE), P(NODE), P()),
            out_specs=spec,  # [b/data, count, ..., c]
        )(x, self._tables, jnp.asarray(table), self._scale)

    def _emulated(self, x: Array) -> Array:
        rows = self._from_top(2 * x.shape[1])
        own = np.arange(self.mesh.nodes)[:, None]
        remote = ~self._outside() & (rows // self.bands.size != own)
        both = jnp.concatenate([x, _arrived(x, self.wire_dtype, self._scale)], 1)
        return self._take(both, (rows + remote * x.shape[1]).reshape(-1))


class ChannelsToRows(RowReader):
    """Every node owns all rows of its channels, and gives others the rows that they read.

    ``[b, h, ..., n*c_own]``; all of a node's channels move.
    """

    def _plan(self) -> tuple[Hop, ...]:
        nodes = range(self.mesh.nodes)
        return tuple(
            Hop(offset, tuple(tuple(self.reads.needed[(s + offset) % len(nodes)]) for s in nodes))
            for offset in nodes[1:]
        )

    def _rows(self, x: Float[Array, "b h ... c"]) -> Float[Array, "b n*count ... c"]:
        if not self.mesh.distributed:
            return self._emulated(x)
        own = self._from_top(self.height)
        most = max(map(len, self.reads.needed))
        starts = np.array([[needed.start] for needed in self.reads.needed])
        place = np.where(self._outside(), most, own - starts)

        def on_node(x: Array, sends: list[Array], own: Array, place: Array, scale: Any) -> Array:
            found = [self._take(x, own[0])]
            for hop, rows in zip(self.hops, sends, strict=True):
                sent = jnp.take(x, rows[0], axis=1, mode="clip")
                found.append(self._take(self._move(sent, hop, scale), place[0]))
            blocks = jnp.moveaxis(_by_source(found), 0, -2)
            return jnp.reshape(blocks, (*blocks.shape[:-2], -1))

        return jax.shard_map(
            on_node,
            mesh=self.mesh.jax_mesh,
            # [b/data, h, ..., c/n], [1, width] a hop, [1, count], [1, count], [2, c/n]
            in_specs=(activation_spec(x.ndim, self.mesh), P(NODE), P(NODE), P(NODE), P(None, NODE)),
            out_specs=row_spec(x.ndim, self.mesh),  # [b/data, count, ..., c]
        )(x, self._tables, jnp.asarray(own), jnp.asarray(place), self._scale)

    def _emulated(self, x: Array) -> Array:
        rows = self._from_top(self.height).reshape(-1)
        taken, arrived = (
            self._take(x, rows),
            self._take(_arrived(x, self.wire_dtype, self._scale), rows),
        )
        own = owned(self.channels, self.mesh.nodes).repeat(self.reads.count, 0)
        return jnp.where(own.reshape(len(rows), *[1] * (x.ndim - 3), -1), taken, arrived)


class RowsToChannels(Reader):
    """Every node owns some rows of all channels, and gives others those of the channels they read.

    ``[b, n*band, ..., c]`` to blocks of ``r`` readable channels with all rows, which layers split
    by channels read. All that a node reads is rounded as on the wire, its own rows as well.

    Args:
      like: the reader it replaces.
      height: rows of the map.
      readable: ``int[node, r]``, global indices of the channels that each node reads, -1 for fill.
      packed: whether the kernels that read this are packed.
      wire_dtype: how channels move.
      scale: lowest value and step of every channel, from ``wire.scale``; for integers.
    """

    def __init__(
        self,
        like: Reader,
        height: int,
        readable: Int[np.ndarray, "n r"],
        *,
        packed: bool = True,
        wire_dtype: str = "float32",
        scale: Float[np.ndarray, "2 c"] | None = None,
    ):
        super().__init__(like.features, mesh=like.mesh, pad=True, unit=like.unit)
        self.name = like.name
        self.height, self.packed = height, packed
        self.wire_dtype = wire.check_wire_dtype(wire_dtype)
        self.scale = nnx.data(None if scale is None else Scale(self.mesh.put(scale)))
        nodes = range(self.mesh.nodes)
        wanted = tuple(tuple(np.maximum(row, 0).tolist()) for row in readable)
        self.hops = tuple(
            Hop(offset, tuple(wanted[(s + offset) % len(nodes)] for s in nodes))
            for offset in nodes[1:]
        )
        self.readable = wanted

    def __call__(self, x: Float[Array, "b h ... c"]) -> Readable:
        self._check(x)
        note(self, x)
        scale = None if self.scale is None else self.scale[...]
        values = self._permute(x, scale) if self.mesh.distributed else self._emulated(x, scale)
        return Readable(values, self.mesh, packed=self.packed, source=id(self))

    def _permute(self, x: Array, scale: Array | None) -> Array:
        def on_node(x: Array, sends: list[Array], own: Array, scale: Array | None) -> Array:
            def codes(channels: Array) -> Array | None:
                return None if scale is None else jnp.take(scale, channels, axis=-1)

            back = codes(own[0])
            found = [_arrived(jnp.take(x, own[0], axis=-1), self.wire_dtype, back)]
            for hop, table in zip(self.hops, sends, strict=True):
                sent = jnp.take(x, table[0], axis=-1, mode="clip")
                moved = wire.encode(sent, self.wire_dtype, codes(table[0]))
                moved = lax.ppermute(moved, NODE, hop.pairs)
                found.append(wire.decode(moved, self.wire_dtype, sent, back))
            rows = jnp.moveaxis(_by_source(found), 0, 1)  # [b, n, band, ..., r]
            rows = jnp.reshape(rows, (x.shape[0], -1, *rows.shape[3:]))
            return rows[:, : self.height]

        return jax.shard_map(
            on_node,
            mesh=self.mesh.jax_mesh,
            # [b/data, band, ..., c], [1, r] a hop, [1, r], [2, c]
            in_specs=(row_spec(x.ndim, self.mesh), P(NODE), P(NODE), P()),
            out_specs=activation_spec(x.ndim, self.mesh),  # [b/data, h, ..., r]
        )(x, [jnp.asarray(h.filled()) for h in self.hops], jnp.asarray(self.readable), scale)

    def _emulated(self, x: Array, scale: Array | None) -> Array:
        arrived = _arrived(x[:, : self.height], self.wire_dtype, scale)
        return jnp.take(arrived, np.array(self.readable).reshape(-1), axis=-1)


def _arrived(x: Array, wire_dtype: str, scale: Array | None) -> Array:
    return wire.decode(wire.encode(x, wire_dtype, scale), wire_dtype, x, scale)


def _by_source(found: Sequence[Array]) -> Array:
    """On a node: what each has sent, by node, given what came from 0, 1, ... places before."""
    source = (lax.axis_index(NODE) - jnp.arange(len(found))) % len(found)
    return jnp.stack(found)[source]
