"""Which channels of an array lie on which node: what a foreign model's glue does to them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from disco_jax.partition import padded

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """An array that the nodes share along one axis.

    Attributes:
      axis: that axis.
      order: ``int[node, slot]``, the index that lies in each slot of each node's block; -1 is a
        dead slot.
      maker: path of the layer whose output channels have this very order, "" if there is none.
    """

    axis: int
    order: Int[np.ndarray, "n p"]
    maker: str = ""

    @property
    def nodes(self) -> int:
        return self.order.shape[0]

    @property
    def width(self) -> int:
        """Slots of one node."""
        return self.order.shape[1]

    @property
    def size(self) -> int:
        """Indices along the axis, dead slots not counted."""
        return int((self.order >= 0).sum())

    @property
    def dead(self) -> bool:
        return bool((self.order < 0).any())

    @property
    def plain(self) -> bool:
        """Whether the array is the ordinary one, nothing moved and nothing added."""
        return np.array_equal(self.order.ravel(), np.arange(self.order.size))

    @property
    def key(self) -> tuple[int, int, bytes]:
        """Equal for those that lie alike."""
        return self.axis, self.nodes, self.order.astype(np.int64).tobytes()

    def same(self, other: Layout | None) -> bool:
        return other is not None and self.key == other.key

    def at(self, axis: int) -> Layout:
        return dataclasses.replace(self, axis=axis)

    def positions(self) -> Int[np.ndarray, "c"]:
        """The flat slot in which each index lies."""
        slots = self.order.ravel()
        alive = np.flatnonzero(slots >= 0)
        return alive[np.argsort(slots[alive])]

    def dead_last(self) -> Layout | None:
        """The same channels on the same nodes, dead slots at the very end; None if they cannot be.

        >>> Layout(1, np.array([[0, 1], [-1, 2]])).dead_last().order.tolist()
        [[0, 1], [2, -1]]
        """
        slots = np.take_along_axis(self.order, np.argsort(self.order < 0, 1, kind="stable"), 1)
        alive = slots.ravel() >= 0
        return (
            dataclasses.replace(self, order=slots)
            if (alive == np.sort(alive)[::-1]).all()
            else None
        )

    def unit(self) -> int | None:
        """How many channels an exchange must keep together to have as many slots; None: no number.

        >>> Layout(1, np.array([[0, 1, 2, 3], [4, 5, -1, -1]])).unit()
        2
        """
        units = [u for u in range(1, self.width + 1) if self.size % u == 0 and self.width % u == 0]
        slots = [padded(self.size, self.nodes, pad=True, unit=u) for u in units]
        return next((u for u, n in zip(units, slots, strict=True) if n == self.order.size), None)


def in_order(features: int, nodes: int, unit: int = 1) -> Int[np.ndarray, "n p"]:
    """The order of channels that a layer gives its outputs if nobody asks for another.

    >>> in_order(3, 2).tolist()
    [[0, 1], [2, -1]]
    """
    slots = np.arange(padded(features, nodes, pad=True, unit=unit))
    return np.where(slots < features, slots, -1).reshape(nodes, -1)


def dealt(sections: Sequence[int], nodes: int) -> Int[np.ndarray, "n p"] | None:
    """An order in which every node has an equal part of each section; None if there is none.

    >>> dealt([2, 4], 2).tolist()
    [[0, 2, 3], [1, 4, 5]]
    """
    if any(size % nodes for size in sections):
        return None
    parts = np.split(np.arange(sum(sections)), np.cumsum(sections)[:-1])
    return np.concatenate([part.reshape(nodes, -1) for part in parts], axis=1)


def reshaped(layout: Layout, shape: Shape, new_shape: Shape) -> tuple[Layout, Shape] | None:
    """The layout after a reshape that every node can do on its own block, and the block's shape.

    >>> whole = Layout(1, in_order(8, 2))
    >>> after, block = reshaped(whole, (1, 8), (1, 4, 2))
    >>> after.axis, after.order.tolist(), block
    (1, [[0, 1], [2, 3]], (1, 2, 2))
    """
    first, last, new_first, new_last = _group(shape, new_shape, layout.axis)
    old, new = list(shape[first:last]), new_shape[new_first:new_last]
    indices = _flat_indices(layout, old, layout.axis - first)
    for axis in sorted(range(len(new)), key=lambda axis: new[axis] == 1):
        order = _box(indices, new, axis)
        if order is not None:
            block = [*new_shape]
            block[new_first + axis] = order.shape[1]
            maker = layout.maker if max(new) == layout.size == math.prod(new) else ""
            return Layout(new_first + axis, order, maker), tuple(block)
    return None


def orders_for_reshape(
    axis: int, shape: Shape, new_shape: Shape, nodes: int
) -> Iterator[Int[np.ndarray, "n p"]]:
    """Orders of one axis after which each node can split it into several on its own.

    >>> [order.tolist() for order in orders_for_reshape(1, (1, 6), (1, 3, 2), 2)]
    [[[0, 2, 4], [1, 3, 5]]]
    """
    first, last, new_first, new_last = _group(shape, new_shape, axis)
    if math.prod(shape[first:last]) != shape[axis]:
        return
    new = new_shape[new_first:new_last]
    flat = np.arange(shape[axis]).reshape(new)
    for j, size in enumerate(new):
        if size > 1 and size % nodes == 0:
            yield np.stack([part.ravel() for part in np.split(flat, nodes, j)])


def _group(shape: Shape, new_shape: Shape, axis: int) -> tuple[int, int, int, int]:
    """The fewest axes around ``axis`` that a reshape mixes: ``first, last`` of before and after."""
    i = j = 0
    while True:
        start, new_start = i, j
        size, new_size = shape[i], new_shape[j] if j < len(new_shape) else 1
        i, j = i + 1, j + 1
        while size != new_size:
            if size < new_size:
                size, i = size * shape[i], i + 1
            else:
                new_size, j = new_size * new_shape[j], j + 1
        if i > axis:
            return start, i, new_start, j


def _flat_indices(layout: Layout, shape: list[int], axis: int) -> Int[np.ndarray, "n ..."]:
    """For each node the flat index, within ``shape``, of all its entries; -1 where dead."""
    block = [*shape[:axis], layout.width, *shape[axis + 1 :]]
    along = np.expand_dims(layout.order, [i + 1 for i in range(len(shape)) if i != axis])
    rest = np.arange(math.prod(shape)).reshape(shape).take([0], axis)
    indices = rest + along * math.prod(shape[axis + 1 :])
    return np.where(along < 0, -1, indices).reshape(layout.nodes, *block)


def _box(
    indices: Int[np.ndarray, "n ..."], shape: Shape, axis: int
) -> Int[np.ndarray, "n p"] | None:
    """Which part of ``axis`` each node has, if it has all of the other axes; else None."""
    nodes = len(indices)
    rest = math.prod(shape) // shape[axis]
    width, odd = divmod(indices[0].size, rest)
    if odd or not width:
        return None
    block = [*shape[:axis], width, *shape[axis + 1 :]]
    found = np.moveaxis(indices.reshape(nodes, *block), axis + 1, 1).reshape(nodes, width, rest)
    grid = np.moveaxis(np.arange(math.prod(shape)).reshape(shape), axis, 0).reshape(-1, rest)
    step = math.prod(shape[axis + 1 :])
    along = np.where(found[..., 0] < 0, -1, found[..., 0] // step % shape[axis])
    expected = np.where(along[..., None] < 0, -1, grid[np.maximum(along, 0)])
    return along if np.array_equal(found, expected) else None
