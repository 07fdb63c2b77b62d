"""Which primitives every node can compute on its own blocks, and how their result lies.

A rule takes an equation and the layouts of its operands (None: every node holds all of it) and
returns a :class:`Local` operation, or None where nodes would need each other's blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from disco_jax.interop import programs
from disco_jax.interop.layout import Layout, reshaped
from disco_jax.sparsify.channels import ELEMENTWISE

Layouts = Sequence[Layout | None]


@dataclasses.dataclass(frozen=True)
class Local:
    """An operation of each node on its own blocks.

    Attributes:
      run: the operation; from blocks of the operands to blocks of the results.
      wants: how the operands must lie.
      gives: how the results lie.
      aligned: whether it does the same to every slot, so that it may as well run on the whole
        array at once.
    """

    run: Callable[..., Sequence[Array]]
    wants: tuple[Layout | None, ...]
    gives: tuple[Layout | None, ...]
    aligned: bool = True


Rule = Callable[[JaxprEqn, Layouts], Local | None]


def local(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    """What ``eqn``, of whose operands at least one is split, is on every node's own blocks."""
    rule = RULES.get(eqn.primitive.name)
    return rule(eqn, layouts) if rule else None


def take_slots(
    layout: Layout, wanted: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    """``[n, q]`` slots of each node whose index is ``wanted``, and these indices.

    None if the nodes have different numbers of them.
    """
    chosen = [np.flatnonzero((row >= 0) & wanted(row)) for row in layout.order]
    if not len(chosen[0]) or len({len(slots) for slots in chosen}) > 1:
        return None
    slots = np.stack(chosen)
    return slots, np.take_along_axis(layout.order, slots, axis=1)


def _same(eqn: JaxprEqn, layout: Layout, gives: Layout | None = None, **params: Any) -> Local:
    """The primitive itself, of one split operand first and others that all nodes hold."""
    others = (None,) * (len(eqn.invars) - 1)
    return Local(_bound(eqn, **params), (layout, *others), (gives or layout,) * len(eqn.outvars))


def _bound(eqn: JaxprEqn, **changes: Any) -> Callable[..., Sequence[Array]]:
    return lambda *blocks: programs.bind(eqn, blocks, **changes)


def _shapes(eqn: JaxprEqn) -> list[tuple[int, ...]]:
    return [aval.shape for aval in programs.avals(eqn.invars)]


def _first(layouts: Layouts) -> Layout | None:
    """The layout of the first operand if no other is split."""
    return layouts[0] if all(layout is None for layout in layouts[1:]) else None


def elementwise(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    """Alone if all operands lie alike; a scalar, and an axis of size 1, meet every channel."""
    (shape, *_) = (aval.shape for aval in programs.avals(eqn.outvars))
    for layout in layouts:
        if layout is not None and shape[layout.axis] == layout.size:
            sizes = [len(s) and s[layout.axis] for s in _shapes(eqn)]
            wants = tuple(layout if size == layout.size else None for size in sizes)
            return Local(_bound(eqn), wants, (layout,) * len(eqn.outvars))
    return None


def _along_other_axes(parameter: str) -> Rule:
    """Primitives that work along one axis, or several, and keep the shape."""

    def rule(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
        layout, axes = _first(layouts), eqn.params[parameter]
        if layout is None or layout.axis in np.atleast_1d(axes):
            return None
        return _same(eqn, layout)

    return rule


def _reduce(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout, axes = _first(layouts), eqn.params["axes"]
    if layout is None or layout.axis in axes:
        return None
    return _same(eqn, layout, layout.at(layout.axis - sum(axis < layout.axis for axis in axes)))


def _reduce_window(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout, params = _first(layouts), eqn.params
    if layout is None or any(
        params[name][layout.axis] not in (1, (0, 0))
        for name in (
            "window_dimensions",
            "window_strides",
            "padding",
            "base_dilation",
            "window_dilation",
        )
    ):
        return None
    return _same(eqn, layout)


def _pad(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout = _first(layouts)
    if layout is None or any(eqn.params["padding_config"][layout.axis]):
        return None
    return _same(eqn, layout)


def _transpose(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout = layouts[0]
    assert layout is not None
    return _same(eqn, layout, layout.at(eqn.params["permutation"].index(layout.axis)))


def _squeeze(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout, dimensions = layouts[0], eqn.params["dimensions"]
    assert layout is not None
    if layout.axis in dimensions:
        return None
    return _same(eqn, layout, layout.at(layout.axis - sum(d < layout.axis for d in dimensions)))


def _broadcast_in_dim(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout = _first(layouts)
    if layout is None:
        return None
    dimensions, shape = eqn.params["broadcast_dimensions"], eqn.params["shape"]
    axis = dimensions[layout.axis]
    if shape[axis] != _shapes(eqn)[0][layout.axis]:
        return None

    def run(block: Array) -> Sequence[Array]:
        local_shape = [*shape[:axis], block.shape[layout.axis], *shape[axis + 1 :]]
        return [lax.broadcast_in_dim(block, local_shape, dimensions)]

    return Local(run, (layout,), (layout.at(axis),))


def _reshape(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout = _first(layouts)
    if layout is None or eqn.params["dimensions"] is not None:
        return None
    found = reshaped(layout, _shapes(eqn)[0], eqn.params["new_sizes"])
    return None if found is None else reshape(layout, *found)


def reshape(layout: Layout, after: Layout, block_shape: Sequence[int]) -> Local:
    """Every node's reshape of its block to ``block_shape``."""
    return Local(
        lambda block: [jnp.reshape(block, block_shape)], (layout,), (after,), aligned=False
    )


def _slice(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout = layouts[0]
    assert layout is not None
    start, limit = list(eqn.params["start_indices"]), list(eqn.params["limit_indices"])
    strides, axis = eqn.params["strides"], layout.axis
    step = strides[axis] if strides else 1
    if limit[axis] - start[axis] == _shapes(eqn)[0][axis] and step == 1:

        def run(block: Array) -> Sequence[Array]:
            until = [*limit[:axis], block.shape[axis], *limit[axis + 1 :]]
            return [lax.slice(block, start, until, strides)]

        return Local(run, (layout,), (layout,))
    found = take_slots(
        layout, lambda i: (i >= start[axis]) & (i < limit[axis]) & ((i - start[axis]) % step == 0)
    )
    if found is None or not (found[0] == found[0][0]).all():
        return None
    slots, indices = found

    def pick(block: Array) -> Sequence[Array]:
        until = [*limit[:axis], block.shape[axis], *limit[axis + 1 :]]
        begin = [*start[:axis], 0, *start[axis + 1 :]]
        steps = strides and [*strides[:axis], 1, *strides[axis + 1 :]]
        return [_pick(lax.slice(block, begin, until, steps), slots[0], axis)]

    after = Layout(axis, (indices - start[axis]) // step)
    return Local(pick, (layout,), (after,), aligned=False)


def _split(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout, sizes, axis = layouts[0], eqn.params["sizes"], eqn.params["axis"]
    assert layout is not None
    if layout.axis != axis:
        return _same(eqn, layout)
    ends = np.cumsum(sizes)

    def part(start: int, end: int) -> tuple[np.ndarray, np.ndarray] | None:
        return take_slots(layout, lambda i: (i >= start) & (i < end))

    found = [part(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    if any(f is None or not (f[0] == f[0][0]).all() for f in found):
        return None
    parts = [f for f in found if f is not None]
    gives = [
        Layout(axis, indices - (end - size))
        for (_, indices), size, end in zip(parts, sizes, ends, strict=True)
    ]
    return Local(
        lambda block: [_pick(block, slots[0], axis) for slots, _ in parts],
        (layout,),
        tuple(gives),
        aligned=False,
    )


def _pick(block: Array, slots: np.ndarray, axis: int) -> Array:
    """These slots of the block; mostly they are neighbours."""
    if np.array_equal(slots, np.arange(slots[0], slots[0] + len(slots))):
        return lax.slice_in_dim(block, int(slots[0]), int(slots[-1]) + 1, axis=axis)
    return jnp.take(block, slots, axis=axis)


def _concatenate(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    axis = eqn.params["dimension"]
    first = next(layout for layout in layouts if layout is not None)
    if first.axis != axis:
        wants = (first,) * len(layouts)
        return Local(_bound(eqn), wants, (first,))
    if any(layout is None or layout.axis != axis for layout in layouts):
        return None
    parts = [layout for layout in layouts if layout is not None]
    starts = np.cumsum([0, *(s[axis] for s in _shapes(eqn)[:-1])])
    orders = [
        np.where(part.order < 0, -1, part.order + start)
        for part, start in zip(parts, starts, strict=True)
    ]
    after = Layout(axis, np.concatenate(orders, axis=1))
    return Local(
        lambda *blocks: [jnp.concatenate(blocks, axis)], tuple(parts), (after,), aligned=False
    )


def _dynamic_slice(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout, sizes = _first(layouts), eqn.params["slice_sizes"]
    if layout is None or sizes[layout.axis] != _shapes(eqn)[0][layout.axis]:
        return None
    axis = layout.axis

    def run(block: Array, *starts: Array) -> Sequence[Array]:
        return [
            lax.dynamic_slice(block, starts, [*sizes[:axis], block.shape[axis], *sizes[axis + 1 :]])
        ]

    return Local(run, (layout, *(None,) * (len(eqn.invars) - 1)), (layout,))


def _gather(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    """Indexing along other axes than the split one."""
    layout, numbers = _first(layouts), eqn.params["dimension_numbers"]
    if layout is None:
        return None
    sizes, axis = list(eqn.params["slice_sizes"]), layout.axis
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    whole = sizes[axis] == _shapes(eqn)[0][axis]
    if axis in gone or axis in numbers.start_index_map or not whole:
        return None
    kept = [i for i in range(len(sizes)) if i not in gone]

    def run(block: Array, indices: Array) -> Sequence[Array]:
        local_sizes = (*sizes[:axis], block.shape[axis], *sizes[axis + 1 :])
        return _bound(eqn, slice_sizes=local_sizes)(block, indices)

    return Local(run, (layout, None), (layout.at(numbers.offset_dims[kept.index(axis)]),))


def _dot_general(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    """A product with the split axis among the batch axes, or among those that one side keeps."""
    contracted, batched = eqn.params["dimension_numbers"]
    side = 0 if layouts[0] is not None else 1
    layout = layouts[side]
    assert layout is not None
    if layout.axis in contracted[side]:
        return None
    wants: list[Layout | None] = [layout, layout]
    if layout.axis in batched[side]:
        place = batched[side].index(layout.axis)
        wants[1 - side] = layout.at(batched[1 - side][place])
        return Local(_bound(eqn), tuple(wants), (layout.at(place),))
    if layouts[1 - side] is not None:
        return None
    wants[1 - side] = None
    used = [{*contracted[i], *batched[i]} for i in (0, 1)]
    kept = [
        [axis for axis in range(len(shape)) if axis not in gone]
        for shape, gone in zip(_shapes(eqn), used, strict=True)
    ]
    place = len(batched[0]) + (len(kept[0]) if side else 0) + kept[side].index(layout.axis)
    return Local(_bound(eqn), tuple(wants), (layout.at(place),))


def _identity(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    """Where an author wants an array to lie says nothing about the nodes."""
    return Local(lambda block: [block], tuple(layouts), tuple(layouts))


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
        _reduce,
    ),
    **dict.fromkeys(("argmax", "argmin"), _reduce),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along_other_axes("axis")
    ),
    **dict.fromkeys(
        ("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"),
        _reduce_window,
    ),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "pad": _pad,
    "reshard": _identity,
    "sharding_constraint": _identity,
    "reshape": _reshape,
    "rev": _along_other_axes("dimensions"),
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
