"""The steps of a flow one by one, with what moves an array from one layout to another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from disco_jax.interop.flow import Flow, Gathered, Order, Plain, Step, Value
from disco_jax.interop.layout import Layout, reshaped
from disco_jax.interop.local import Local
from disco_jax.interop.locality import reshape


class Builder:
    """Adds steps to a flow.

    Attributes:
      nodes: number of nodes.
      flow: the steps so far.
      reason: what is being planned, for the report.
    """

    def __init__(self, nodes: int, flow: Flow):
        self.nodes, self.flow = nodes, flow
        self.reason = ""
        self._slots = itertools.count()
        self._names: set[str] = set()
        self._made: dict[tuple[int, Hashable], Value] = {}
        self._clean: set[int] = set()  # values whose dead slots are 0

    def new(self, aval: Any, layout: Layout | None = None) -> Value:
        """A value that no step has written yet."""
        return Value(next(self._slots), tuple(aval.shape), aval.dtype, layout)

    def constant(self, value: Any) -> Value:
        made = self.new(jax.typeof(value))
        self.flow.constants.append((made.slot, value))
        return made

    def add(self, op: Any, ins: Iterable[Value], outs: Sequence[Value]) -> Sequence[Value]:
        """Adds a step and returns what it writes."""
        self.flow.steps.append(Step(op, tuple(ins), tuple(outs)))
        return outs

    def local(self, op: Local, ins: Sequence[Value], avals: Sequence[Any]) -> Sequence[Value]:
        """Adds what every node does alone, after moving the operands to where it wants them."""
        ins = [self.lying(v, layout) for v, layout in zip(ins, op.wants, strict=True)]
        outs = [self.new(a, layout) for a, layout in zip(avals, op.gives, strict=True)]
        return self.add(op, ins, outs)

    def lying(self, value: Value, layout: Layout | None) -> Value:
        """The value, moved if it does not lie so already."""
        if layout is None:
            return self.held(value)
        if layout.same(value.layout):
            return value
        if value.layout is None:
            return self._placed(value, layout)
        if value.layout.axis == layout.axis:
            self.ask(value.layout, layout.order)
            self.ask(layout, value.layout.order)
            if np.array_equal(np.sort(value.layout.order), np.sort(layout.order)):
                return self._sorted(value, layout)
        return self._placed(self.held(value), layout)

    def ask(self, layout: Layout, order: Order) -> None:
        """Notes that another order of a layer's channels would do, or do better."""
        if layout.maker and not np.array_equal(layout.order, order):
            self.flow.wishes.append((layout.maker, order))

    def held(self, value: Value) -> Value:
        """The value on every node, gathered if it is not there."""
        if value.layout is None:
            return value
        return self._once(value, "held", lambda: self.gathered(value))

    def gathered(self, value: Value) -> Value:
        """The value on every node, by a gather of its own."""
        assert value.layout is not None
        self.flow.cost += math.prod(value.shape)
        base = (value.layout.maker or "value").replace(".", "_")
        names = (f"{base}_{i}" if i else base for i in itertools.count())
        name = next(name for name in names if name not in self._names)
        self._names.add(name)
        op = Gathered(name, value.layout, self.reason)
        return self.add(op, [value], [self.new(value)])[0]

    def filled(self, value: Value, fill: Any) -> Value:
        """The value with dead slots set to ``fill``."""
        layout = value.layout
        if layout is None or not layout.dead or (fill == 0 and value.slot in self._clean):
            return value

        def make() -> Value:
            table = self._table(layout.order)
            op = Local(
                lambda x, table: [_fill(x, table, layout.axis, fill)],
                (layout, table.layout),
                (layout,),
            )
            return self.add(op, [value, table], [self.new(value, layout)])[0]

        return self._once(value, ("fill", fill), make)

    def reshaped(self, value: Value, shape: tuple[int, ...]) -> Value:
        """A reshape, by each node alone if that can be."""

        def make() -> Value:
            aval = jax.ShapeDtypeStruct(shape, value.dtype)
            found = value.layout and reshaped(value.layout, value.shape, shape)
            if not (found and value.layout):
                op = Plain(lambda x: [jnp.reshape(x, shape)])
                return self.add(op, [self.held(value)], [self.new(aval)])[0]
            out = self.local(reshape(value.layout, *found), [value], [aval])[0]
            if value.slot in self._clean:
                self._clean.add(out.slot)
            return out

        return self._once(value, ("reshape", shape), make)

    def _placed(self, value: Value, layout: Layout) -> Value:
        """Every node takes its own part of what it holds the whole of."""
        return self._taken(value, None, layout, layout.order, aligned=True)

    def _sorted(self, value: Value, layout: Layout) -> Value:
        """Every node puts its own channels in another order."""
        assert value.layout is not None
        pairs = zip(value.layout.order, layout.order, strict=True)
        slots = np.stack([_positions(old, new) for old, new in pairs])
        return self._taken(value, value.layout, layout, slots, aligned=False)

    def _taken(
        self, value: Value, before: Layout | None, after: Layout, slots: Order, *, aligned: bool
    ) -> Value:
        def run(x: Array, table: Array) -> Sequence[Array]:
            return [_fill(jnp.take(x, jnp.maximum(table, 0), after.axis), table, after.axis, 0)]

        def make() -> Value:
            table = self._table(slots)
            op = Local(run, (before, table.layout), (after,), aligned)
            return self.add(op, [value, table], [self.new(value, after)])[0]

        return self._once(value, ("take", *after.key), make)

    def _table(self, order: Order) -> Value:
        """Numbers of which every node gets its own row."""
        shape = jax.ShapeDtypeStruct((order.size,), np.int32)
        made = self.new(shape, Layout(0, np.arange(order.size).reshape(order.shape)))
        self.flow.tables.append((made.slot, order.ravel().astype(np.int32)))
        return made

    def _once(self, value: Value, how: Hashable, make: Callable[[], Value]) -> Value:
        """What was made of this value in this way before, or else is made now."""
        key = (value.slot, how)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _fill(x: Array, table: Array, axis: int, fill: Any) -> Array:
    alive = jnp.expand_dims(table >= 0, [i for i in range(x.ndim) if i != axis])
    return jnp.where(alive, x, jnp.asarray(fill, x.dtype))


def _positions(old: Int[np.ndarray, "p"], new: Int[np.ndarray, "p"]) -> Int[np.ndarray, "p"]:
    """The slot in ``old`` of each index of ``new``; -1 for dead ones."""
    slots = {index: slot for slot, index in enumerate(old.tolist()) if index >= 0}
    return np.array([slots.get(index, -1) for index in new.tolist()])
