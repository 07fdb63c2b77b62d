"""Which primitives every node can compute on its own blocks, and how their result lies.

A rule takes an equation and the layouts of its operands (None: every node holds all of it) and
returns a :class:`Local` operation, or None where nodes would need each other's blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from disco_jax.interop import programs
from disco_jax.interop.indexing import INDEXING
from disco_jax.interop.layout import Layout, reshaped
from disco_jax.interop.local import Layouts, Local, Rule, bound, first, resized, same, shapes
from disco_jax.sparsify.channels import ELEMENTWISE


def local(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    """What ``eqn``, of whose operands at least one is split, is on every node's own blocks."""
    rule = RULES.get(eqn.primitive.name)
    return rule(eqn, layouts) if rule else None


def _elementwise(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    """Alone if all operands lie alike; a scalar, and an axis of size 1, meet every channel."""
    (shape, *_) = (aval.shape for aval in programs.avals(eqn.outvars))
    for layout in layouts:
        if layout is not None and shape[layout.axis] == layout.size:
            sizes = [len(s) and s[layout.axis] for s in shapes(eqn)]
            wants = tuple(layout if size == layout.size else None for size in sizes)
            return Local(bound(eqn), wants, (layout,) * len(eqn.outvars))
    return None


def _along_other_axes(parameter: str) -> Rule:
    """Primitives that work along one axis, or several, and keep the shape."""

    def rule(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
        layout, axes = first(layouts), eqn.params[parameter]
        if layout is None or layout.axis in np.atleast_1d(axes):
            return None
        return same(eqn, layout)

    return rule


def _reduce(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout, axes = first(layouts), eqn.params["axes"]
    if layout is None or layout.axis in axes:
        return None
    return same(eqn, layout, layout.at(layout.axis - sum(axis < layout.axis for axis in axes)))


def _reduce_window(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout, params = first(layouts), eqn.params
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
    return same(eqn, layout)


def _pad(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout = first(layouts)
    if layout is None or any(eqn.params["padding_config"][layout.axis]):
        return None
    return same(eqn, layout)


def _transpose(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout = layouts[0]
    assert layout is not None
    return same(eqn, layout, layout.at(eqn.params["permutation"].index(layout.axis)))


def _squeeze(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout, dimensions = layouts[0], eqn.params["dimensions"]
    assert layout is not None
    if layout.axis in dimensions:
        return None
    return same(eqn, layout, layout.at(layout.axis - sum(d < layout.axis for d in dimensions)))


def _broadcast_in_dim(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout = first(layouts)
    if layout is None:
        return None
    dimensions, shape = eqn.params["broadcast_dimensions"], eqn.params["shape"]
    axis = dimensions[layout.axis]
    if shape[axis] != shapes(eqn)[0][layout.axis]:
        return None

    def run(block: Array) -> Sequence[Array]:
        local_shape = resized(shape, axis, block.shape[layout.axis])
        return [lax.broadcast_in_dim(block, local_shape, dimensions)]

    return Local(run, (layout,), (layout.at(axis),))


def _reshape(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    layout = first(layouts)
    if layout is None or eqn.params["dimensions"] is not None:
        return None
    found = reshaped(layout, shapes(eqn)[0], eqn.params["new_sizes"])
    return None if found is None else reshape(layout, *found)


def reshape(layout: Layout, after: Layout, block_shape: Sequence[int]) -> Local:
    """Every node's reshape of its block to ``block_shape``."""
    return Local(
        lambda block: [jnp.reshape(block, block_shape)], (layout,), (after,), aligned=False
    )


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
        return Local(bound(eqn), tuple(wants), (layout.at(place),))
    if layouts[1 - side] is not None:
        return None
    wants[1 - side] = None
    used = [{*contracted[i], *batched[i]} for i in (0, 1)]
    kept = [
        [axis for axis in range(len(shape)) if axis not in gone]
        for shape, gone in zip(shapes(eqn), used, strict=True)
    ]
    place = len(batched[0]) + (len(kept[0]) if side else 0) + kept[side].index(layout.axis)
    return Local(bound(eqn), tuple(wants), (layout.at(place),))


def _identity(eqn: JaxprEqn, layouts: Layouts) -> Local | None:
    """Where an author wants an array to lie says nothing about the nodes."""
    return Local(lambda block: [block], tuple(layouts), tuple(layouts))


RULES: dict[str, Rule] = {
    **INDEXING,
    **dict.fromkeys(ELEMENTWISE, _elementwise),
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
    "dot_general": _dot_general,
    "pad": _pad,
    "reshard": _identity,
    "sharding_constraint": _identity,
    "reshape": _reshape,
    "rev": _along_other_axes("dimensions"),
    "squeeze": _squeeze,
    "transpose": _transpose,
}
