"""Maps split by rows: which rows each node owns, and which it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Bands:
    """A map of ``height`` rows shared by ``nodes``: bands of ``size`` rows, node 0 at the top.

    The last bands may lack rows, or have none; they are filled up with dead rows, so that an array
    has ``nodes * size`` of them. What dead rows hold means nothing, and nobody reads it.

    >>> bands = Bands.equal(height=5, nodes=4)
    >>> bands.size, [list(bands.rows(node)) for node in range(4)]
    (2, [[0, 1], [2, 3], [4], []])
    """

    height: int
    nodes: int
    size: int

    @classmethod
    def equal(cls, height: int, nodes: int) -> Bands:
        """As few dead rows as there can be."""
        return cls(height, nodes, -(-height // nodes))

    def rows(self, node: int) -> range:
        """The living rows that a node owns."""
        start, stop = (min(i * self.size, self.height) for i in (node, node + 1))
        return range(start, stop)


@dataclasses.dataclass(frozen=True)
class Reads:
    """The rows that each node reads of a map.

    Attributes:
      first: of every node, the row that its block starts with; rows outside of the map are padding.
      count: rows of a block.
      needed: of every node, the rows of its block that count: within the map, and read for an
        output that is alive.
    """

    first: tuple[int, ...]
    count: int
    needed: tuple[range, ...]

    @classmethod
    def union(cls, several: Iterable[Reads]) -> Reads:
        """What several operations read together, in one block.

        >>> both = Reads.union([Window(3, 1, 1, 1).reads(8, 2), Window().reads(8, 2)])
        >>> both == Window(3, 1, 1, 1).reads(8, 2)
        True
        """
        several = list(several)
        blocks = ([range(f, f + r.count) for f in r.first] for r in several)
        whole = [_hull(of_node) for of_node in zip(*blocks, strict=True)]
        needed = (_hull(of_node) for of_node in zip(*(r.needed for r in several), strict=True))
        first = tuple(block.start for block in whole)
        return cls(first, max(map(len, whole)), tuple(needed))


def _hull(ranges: Iterable[range]) -> range:
    some = [r for r in ranges if r]
    return range(min(r.start for r in some), max(r.stop for r in some)) if some else range(0)


@dataclasses.dataclass(frozen=True)
class Window:
    """What an operation reads along the rows: output ``o`` reads ``size`` rows from
    ``o * stride - low`` on; ``low`` and ``high`` are rows of padding.

    >>> Window(3, 2, 1, 1).outputs(7), Window(3, 2, 1, 1).reads(7, 2).first
    (4, (-1, 3))
    """

    size: int = 1
    stride: int = 1
    low: int = 0
    high: int = 0

    def outputs(self, height: int) -> int:
        """Rows of the output."""
        return (height + self.low + self.high - self.size) // self.stride + 1

    def reads(self, height: int, nodes: int) -> Reads:
        """The rows that every node reads for its band of the output."""
        out = Bands.equal(self.outputs(height), nodes)
        first = tuple(node * out.size * self.stride - self.low for node in range(nodes))
        needed = []
        for node in range(nodes):
            rows = out.rows(node)
            start = rows.start * self.stride - self.low
            stop = (rows.stop - 1) * self.stride - self.low + self.size
            needed.append(range(max(0, start), min(height, stop)) if rows else range(0))
        return Reads(first, (out.size - 1) * self.stride + self.size, tuple(needed))


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """What bilinear interpolation to ``size`` rows reads: the two around each, pixels as areas.

    >>> Interpolation(8).reads(4, 2).needed
    (range(0, 3), range(1, 4))
    """

    size: int

    def outputs(self, height: int) -> int:
        """Rows of the output."""
        return self.size

    def reads(self, height: int, nodes: int) -> Reads:
        """The rows that every node reads for its band of the output."""
        out, needed = Bands.equal(self.size, nodes), []
        for node in range(nodes):
            around = np.floor(self._centres(height)[out.rows(node)]).astype(int)
            rows = np.clip([*around[:1], *around[-1:] + 1], 0, height - 1)
            needed.append(range(rows[0], rows[-1] + 1) if len(rows) else range(0))
        return Reads(tuple(r.start for r in needed), max(map(len, needed)), tuple(needed))

    def weights(self, height: int, nodes: int) -> Float[np.ndarray, "n band count"]:
        """Of every row of a node's block for every row of its band."""
        reads, band = self.reads(height, nodes), Bands.equal(self.size, nodes).size
        rows = np.add.outer(np.array(reads.first), np.arange(reads.count))
        padded = np.zeros(band * nodes)
        padded[: self.size] = np.clip(self._centres(height), 0, height - 1)
        return np.maximum(0, 1 - np.abs(padded.reshape(nodes, band, 1) - rows[:, None]))

    def _centres(self, height: int) -> Float[np.ndarray, "size"]:
        """Where the rows of the output lie among those of the map."""
        return (np.arange(self.size) + 0.5) * height / self.size - 0.5


def row_messages(bands: Bands, reads: Reads, offset: int) -> tuple[tuple[int, ...], ...]:
    """Of every node, the rows that the node ``offset`` places further on reads, and it owns.

    They are counted from its own first row.

    >>> bands = Bands.equal(8, 2)
    >>> row_messages(bands, Window(3, 1, 1, 1).reads(8, 2), 1)
    ((3,), (0,))
    """
    sends = []
    for source in range(bands.nodes):
        own, needed = bands.rows(source), reads.needed[(source + offset) % bands.nodes]
        sends.append(tuple(row - source * bands.size for row in own if row in needed))
    return tuple(sends)


def block_rows(
    bands: Bands, reads: Reads, hops: Sequence[tuple[int, Sequence[Sequence[int]]]]
) -> Int[np.ndarray, "n count"]:
    """Where each row of every node's block is among its own rows and those received.

    ``hops`` are ``(offset, rows sent by each node)`` as :func:`row_messages` gives them. A row that
    is nowhere, since it is padding or is not needed, has the index behind the last.

    >>> bands, reads = Bands.equal(4, 2), Window(3, 1, 1, 1).reads(4, 2)
    >>> block_rows(bands, reads, [(1, row_messages(bands, reads, 1))]).tolist()
    [[3, 0, 1, 2], [2, 0, 1, 3]]
    """
    widths = [max(map(len, sends)) for _, sends in hops]
    nowhere = bands.size + sum(widths)
    table = np.full((bands.nodes, reads.count), nowhere, np.int32)
    for node in range(bands.nodes):
        known = {row: i for i, row in enumerate(bands.rows(node))}
        start = bands.size
        for (offset, sends), width in zip(hops, widths, strict=True):
            source = (node - offset) % bands.nodes
            known |= {row + source * bands.size: start + i for i, row in enumerate(sends[source])}
            start += width
        for i in range(reads.count):
            row = reads.first[node] + i
            if row in reads.needed[node]:
                table[node, i] = known[row]
    return table
