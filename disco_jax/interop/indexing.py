"""Rules of :mod:`locality` for what cuts arrays into parts and puts parts together."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Int

from disco_jax.interop.layout import Layout
from disco_jax.interop.local import Layouts, Local, Rule, bound, first, resized, same, shapes


def _slice(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout = layouts[0]
    assert layout is not None
    start, limit = list(eqn.params["start_indices"]), list(eqn.params["limit_indices"])
    strides, axis = eqn.params["strides"], layout.axis
    step = strides[axis] if strides else 1
    if limit[axis] - start[axis] == shapes(eqn)[0][axis] and step == 1:

        def run(block: Array) -> Sequence[Array]:
            return [lax.slice(block, start, resized(limit, axis, block.shape[axis]), strides)]

        return Local(run, (layout,), (layout,))
    found = _slots(layout, range(start[axis], limit[axis], step))
    if found is None:
        return None
    slots, indices = found

    def pick(block: Array) -> Sequence[Array]:
        steps = strides and resized(strides, axis, 1)
        until = resized(limit, axis, block.shape[axis])
        return [_pick(lax.slice(block, resized(start, axis, 0), until, steps), slots, axis)]

    return Local(pick, (layout,), (Layout(axis, indices),), aligned=False)


def _split(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout, sizes, axis = layouts[0], eqn.params["sizes"], eqn.params["axis"]
    assert layout is not None
    if layout.axis != axis:
        return same(eqn, layout)
    ends = np.cumsum(sizes)
    found = [_slots(layout, range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    parts = [part for part in found if part is not None]
    if len(parts) < len(found):
        return None
    return Local(
        lambda block: [_pick(block, slots, axis) for slots, _ in parts],
        (layout,),
        tuple(Layout(axis, indices) for _, indices in parts),
        aligned=False,
    )


def _pick(block: Array, slots: np.ndarray, axis: int) -> Array:
    """These slots of the block; mostly they are neighbours."""
    if np.array_equal(slots, np.arange(slots[0], slots[0] + len(slots))):
        return lax.slice_in_dim(block, int(slots[0]), int(slots[-1]) + 1, axis=axis)
    return jnp.take(block, slots, axis=axis)


def _slots(
    layout: Layout, wanted: range
) -> tuple[Int[np.ndarray, "q"], Int[np.ndarray, "n q"]] | None:
    """The slots of a block that hold ``wanted``, and which of these each node has there.

    None unless they are the same slots on every node.
    """
    held = np.isin(layout.order, np.array(wanted))
    if not held.any() or (held != held[0]).any():
        return None
    return np.flatnonzero(held[0]), (layout.order[:, held[0]] - wanted.start) // wanted.step


def _concatenate(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    axis = eqn.params["dimension"]
    first = next(layout for layout in layouts if layout is not None)
    if first.axis != axis:
        wants = (first,) * len(layouts)
        return Local(bound(eqn), wants, (first,))
    if any(layout is None or layout.axis != axis for layout in layouts):
        return None
    parts = [layout for layout in layouts if layout is not None]
    starts = np.cumsum([0, *(s[axis] for s in shapes(eqn)[:-1])])
    orders = [
        np.where(part.order < 0, -1, part.order + start)
        for part, start in zip(parts, starts, strict=True)
    ]
    after = Layout(axis, np.concatenate(orders, axis=1))
    return Local(
        lambda *blocks: [jnp.concatenate(blocks, axis)], tuple(parts), (after,), aligned=False
    )


def _dynamic_slice(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout, sizes = first(layouts), eqn.params["slice_sizes"]
    if layout is None or sizes[layout.axis] != shapes(eqn)[0][layout.axis]:
        return None
    axis = layout.axis

    def run(block: Array, *starts: Array) -> Sequence[Array]:
        return [lax.dynamic_slice(block, starts, resized(sizes, axis, block.shape[axis]))]

    return Local(run, (layout, *(None,) * (len(eqn.invars) - 1)), (layout,))


def _gather(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    """Indexing along other axes than the split one."""
    layout, numbers = first(layouts), eqn.params["dimension_numbers"]
    if layout is None:
        return None
    sizes, axis = list(eqn.params["slice_sizes"]), layout.axis
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    whole = sizes[axis] == shapes(eqn)[0][axis]
    if axis in gone or axis in numbers.start_index_map or not whole:
        return None
    kept = [i for i in range(len(sizes)) if i not in gone]

    def run(block: Array, indices: Array) -> Sequence[Array]:
        return bound(eqn, slice_sizes=resized(sizes, axis, block.shape[axis]))(block, indices)

    return Local(run, (layout, None), (layout.at(numbers.offset_dims[kept.index(axis)]),))


INDEXING: dict[str, Rule] = {
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "slice": _slice,
    "split": _split,
}
