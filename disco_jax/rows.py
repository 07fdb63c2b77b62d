"""Exchanges of maps that are split by rows: halos, and what lies between rows and channels.

Split by rows (Mao et al. 2017, MoDNN; Zhao et al. 2018, DeepThings) a layer computes what it would
on one node: a node holds all of its weights, and reads its own rows and a few of its neighbours'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from disco_jax import wire
from disco_jax.bands import Bands, Reads, block_rows, row_messages
from disco_jax.errors import require
from disco_jax.exchange import Reader
from disco_jax.gather import floating
from disco_jax.mesh import NODE
from disco_jax.messages import Pairs, permute
from disco_jax.packed import Hop
from disco_jax.partition import activation_spec, batch_spec, owned, row_spec
from disco_jax.readable import Readable, ReadableRows, note

Move = Callable[[Array, Pairs], Array]


class RowReader(Reader):
    """What gives every node the rows that it reads; the subclasses say where these are.

    Args:
      like: the reader it replaces.
      bands: the rows of the map, and who owns them where it is split by rows.
      reads: which of them each node reads, all readers of the map together.
      fill: what rows of padding hold.
      wire_dtype: how rows move; own rows are read as they were computed. None: as computed.
    """

    split = "rows"
    split_axis = None  # every node computes all channels of its rows

    def __init__(
        self,
        like: Reader,
        bands: Bands,
        reads: Reads,
        *,
        fill: float = 0.0,
        wire_dtype: str | None = None,
    ):
        super().__init__(like.features, mesh=like.mesh, pad=True, unit=like.unit)
        self.channels = like.channels
        self.name = like.name
        self.bands, self.reads, self.fill = bands, reads, fill
        self.wire_dtype = floating(wire_dtype)
        self.hops = self._plan()

    def _plan(self) -> tuple[Hop, ...]:
        """What moves; of a hop's ``sends`` the numbers are rows, counted from a node's first."""
        raise NotImplementedError

    def tables(self) -> list[Int[np.ndarray, "n _"]]:
        """For :meth:`on_node`, a row for each node; what it sends in every hop comes last."""
        raise NotImplementedError

    def on_node(self, x: Array, tables: Sequence[Array], node: Array | int, move: Move) -> Array:
        """What one node does: from what it owns to the rows that it reads.

        Args:
          x: its part of the map.
          tables: its rows of :meth:`tables`.
          node: which it is.
          move: gives away what is encoded, and returns what it was given, by (source, destination).
        """
        raise NotImplementedError

    def _spec(self, ndim: int) -> P:
        """How the map lies on the nodes."""
        raise NotImplementedError

    def _emulated(self, x: Array) -> Array:
        raise NotImplementedError

    def __call__(self, x: Float[Array, "b h ... c"]) -> ReadableRows:
        self._check(x)
        check_rows(self, x, banded=isinstance(self, HaloExchange))
        note(self, x)
        rows = self._on_nodes(x) if self.mesh.distributed else self._emulated(x)
        return ReadableRows(
            rows, self.mesh, source=id(self), height=self.bands.height, reads=self.reads
        )

    def _on_nodes(self, x: Array) -> Array:
        return jax.shard_map(
            lambda x, tables: self.on_node(
                x, [table[0] for table in tables], lax.axis_index(NODE), permute
            ),
            mesh=self.mesh.jax_mesh,
            in_specs=(self._spec(x.ndim), P(NODE)),  # the node's part, a row of each table
            out_specs=row_spec(x.ndim, self.mesh),  # [b/data, count, ..., c]
        )(x, [jnp.asarray(table) for table in self.tables()])

    def _received(self, x: Array, sends: Sequence[Array], move: Move) -> list[Array]:
        """On a node: what every hop brings."""
        dtype = self.wire_dtype or str(x.dtype)
        found = []
        for hop, rows in zip(self.hops, sends, strict=True):
            sent = jnp.take(x, rows, axis=1, mode="clip")
            found.append(wire.decode(move(wire.encode(sent, dtype), hop.pairs), dtype, sent))
        return found

    def unit_size(self, shape: tuple[int, ...], positions: int) -> int:
        """Numbers of one row that is sent, of a map of this shape."""
        return math.prod(shape[2:])

    def _from_top(self, past: int) -> Int[np.ndarray, "n count"]:
        """The rows of every node's block, counted from the map's first; ``past`` is not needed."""
        rows = np.add.outer(self.reads.first, np.arange(self.reads.count))
        needed = [np.isin(r, n) for r, n in zip(rows, self.reads.needed, strict=True)]
        return np.where(needed, rows, past)

    def _take(self, x: Array, rows: Array | np.ndarray) -> Array:
        return jnp.take(x, rows, axis=1, mode="fill", fill_value=self.fill)


class Repeated(Reader):
    """Every node holds the whole input and computes the whole output: nothing moves."""

    split_axis = None
    repeats = True

    def __init__(self, like: Reader):
        super().__init__(like.features, mesh=like.mesh, pad=True, unit=like.unit)
        self.channels, self.name = like.channels, like.name

    def __call__(self, x: Float[Array, "b ... c"]) -> Readable:
        self._check(x)
        return Readable(x, self.mesh, split=False, repeated=True, source=id(self))


class ReplicatedRows(RowReader):
    """Every node holds the whole map, the images say, and reads its rows of it: nothing moves."""

    def _plan(self) -> tuple[Hop, ...]:
        return ()

    def tables(self) -> list[Int[np.ndarray, "n _"]]:
        return [self._from_top(self.bands.height)]

    def on_node(self, x: Array, tables: Sequence[Array], node: Array | int, move: Move) -> Array:
        return self._take(x, tables[0])

    def _spec(self, ndim: int) -> P:
        return batch_spec(ndim, self.mesh)  # [b/data, h, ..., c]

    def _emulated(self, x: Array) -> Array:
        return self._take(x, self._from_top(self.bands.height).reshape(-1))


class HaloExchange(RowReader):
    """A node's own rows, and those beyond its band that it reads: ``[b, n*band, ..., c]``."""

    def _plan(self) -> tuple[Hop, ...]:
        offsets = range(1, self.mesh.nodes)
        hops = (Hop(o, row_messages(self.bands, self.reads, o)) for o in offsets)
        return tuple(hop for hop in hops if any(hop.sends))

    def tables(self) -> list[Int[np.ndarray, "n _"]]:
        block = block_rows(self.bands, self.reads, [(h.offset, h.sends) for h in self.hops])
        return [block, *(hop.filled() for hop in self.hops)]

    def on_node(self, x: Array, tables: Sequence[Array], node: Array | int, move: Move) -> Array:
        block, *sends = tables
        return self._take(jnp.concatenate([x, *self._received(x, sends, move)], 1), block)

    def _spec(self, ndim: int) -> P:
        return row_spec(ndim, self.mesh)  # [b/data, band, ..., c]

    def _emulated(self, x: Array) -> Array:
        past = 2 * x.shape[1]
        rows = self._from_top(past)
        own = np.arange(self.mesh.nodes)[:, None]
        remote = (rows != past) & (rows // self.bands.size != own)
        both = jnp.concatenate([x, wire.arrived(x, self.wire_dtype)], 1)
        return self._take(both, (rows + remote * x.shape[1]).reshape(-1))


class ChannelsToRows(RowReader):
    """Every node owns all rows of its channels, and gives others the rows that they read.

    ``[b, h, ..., n*c_own]``; all of a node's channels move.
    """

    split = "channels to rows"

    def unit_size(self, shape: tuple[int, ...], positions: int) -> int:
        return math.prod(shape[2:]) // self.mesh.nodes

    def _plan(self) -> tuple[Hop, ...]:
        nodes = range(self.mesh.nodes)
        return tuple(
            Hop(offset, tuple(tuple(self.reads.needed[(s + offset) % len(nodes)]) for s in nodes))
            for offset in nodes[1:]
        )

    def tables(self) -> list[Int[np.ndarray, "n _"]]:
        own = self._from_top(self.bands.height)
        starts = np.array([[needed.start] for needed in self.reads.needed])
        most = max(map(len, self.reads.needed))
        received = np.where(own == self.bands.height, most, own - starts)
        return [own, received, *(hop.filled() for hop in self.hops)]

    def on_node(self, x: Array, tables: Sequence[Array], node: Array | int, move: Move) -> Array:
        own, place, *sends = tables
        received = [self._take(y, place) for y in self._received(x, sends, move)]
        blocks = jnp.moveaxis(by_source([self._take(x, own), *received], node), 0, -2)
        return jnp.reshape(blocks, (*blocks.shape[:-2], -1))

    def _spec(self, ndim: int) -> P:
        return activation_spec(ndim, self.mesh)  # [b/data, h, ..., c/n]

    def _emulated(self, x: Array) -> Array:
        rows = self._from_top(self.bands.height).reshape(-1)
        taken = self._take(x, rows)
        sent = wire.arrived(taken, self.wire_dtype)
        own = owned(self.channels, self.mesh.nodes).repeat(self.reads.count, 0)
        return jnp.where(own.reshape(len(rows), *[1] * (x.ndim - 3), -1), taken, sent)


def check_rows(reader: Any, x: Array, *, banded: bool) -> None:
    """A plan for bands of rows is for images of one height."""
    bands = reader.bands
    rows = bands.size * bands.nodes if banded else bands.height
    require(
        x.shape[1] == rows,
        f"`images` have another height than those that the model was split for: "
        f"{reader.name or type(reader).__name__} is given {x.shape[1]} rows, not {rows}; "
        "split and freeze the model for images of this size",
    )


def by_source(found: Sequence[Array], node: Array | int) -> Array:
    """On a node: what each has sent, by node, given what came from 0, 1, ... places before."""
    return jnp.stack(found)[(node - jnp.arange(len(found))) % len(found)]
