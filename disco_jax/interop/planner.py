"""From a model's jaxpr to a flow: what happens on which node, and what must be gathered."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array

from disco_jax.interop import programs
from disco_jax.interop.builder import Builder
from disco_jax.interop.flow import Call, Flow, Kind, Order, Plain, Value, run_alone
from disco_jax.interop.layout import Layout, dealt, in_order, orders_for_reshape
from disco_jax.interop.local import Local
from disco_jax.interop.locality import local
from disco_jax.interop.stand_in import layer_p
from disco_jax.sparsify.channels import ELEMENTWISE, REDUCTIONS

_INLINED = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")


def plan_flow(
    program: ClosedJaxpr,
    nodes: int,
    kinds: Mapping[str, Kind],
    outputs: Mapping[str, Order],
    inputs: Mapping[str, Layout | None] | None = None,
) -> Flow:
    """How the nodes compute ``program``, in which :class:`StandIn` layers stand for ours.

    Args:
      program: from ``jax.make_jaxpr``; its arguments are held by every node.
      nodes: number of nodes.
      kinds: the layers by path.
      outputs: orders of layers' channels that are not as in ``in_order``.
      inputs: how layers that exist already read their input.
    """
    planner = _Planner(nodes, kinds, outputs, Flow(inputs=dict(inputs or {})))
    flow = planner.flow
    flow.arguments = [planner.new(a) for a in programs.avals(program.jaxpr.invars)]
    results = planner.walk(program.jaxpr, program.consts, flow.arguments)
    planner.reason = "the result"
    flow.results = [
        v if v.layout is None or v.layout.plain else planner.gathered(v) for v in results
    ]
    return flow


class _Planner(Builder):
    """Follows a program equation by equation."""

    def __init__(
        self, nodes: int, kinds: Mapping[str, Kind], orders: Mapping[str, Order], flow: Flow
    ):
        super().__init__(nodes, flow)
        self._kinds, self._orders = kinds, orders
        self._line = ""
        self._full_of: dict[int, Value] = {}  # arrays of one number, and that number

    def walk(self, jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Value]) -> list[Value]:
        """Adds the steps of a program; returns its results."""
        known: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))
        known |= {var: self.constant(c) for var, c in zip(jaxpr.constvars, consts, strict=True)}
        cuts = programs.cuts(jaxpr)
        caller = self._line

        def read(v: Any) -> Value:
            return self.constant(v.val) if isinstance(v, Literal) else known[v]

        for eqn in jaxpr.eqns:
            self._line = programs.source(eqn) or caller
            self.reason = f"{eqn.primitive.name} {self._line}".rstrip()
            ins = [read(v) for v in eqn.invars]
            self._wish(eqn, ins, cuts)
            known.update(zip(eqn.outvars, self._equation(eqn, ins), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, ins: list[Value]) -> Sequence[Value]:
        name = eqn.primitive.name
        if eqn.primitive is layer_p:
            return [self._call(eqn, ins[0])]
        held = all(v.layout is None for v in ins)
        layers, inner = programs.layers_inside(eqn), programs.inner_program(eqn)
        if inner is not None and name in _INLINED and (layers or not held):
            return self.walk(inner.jaxpr, inner.consts, ins)
        self.flow.unfit |= dict.fromkeys(layers, f"it is called inside a {name}")
        if held:
            return self._on_every_node(eqn, ins)
        if name in REDUCTIONS and ins[0].layout and ins[0].layout.axis in eqn.params["axes"]:
            return [self._reduced(eqn, ins[0])]
        layouts = [v.layout for v in ins]
        op = self._custom(eqn, layouts) if name == "custom_jvp_call" else local(eqn, layouts)
        if op is None:
            return self._on_every_node(eqn, [self.held(v) for v in ins])
        if name in ELEMENTWISE:
            op, ins = self._with_numbers(op, ins)
        return self.local(op, ins, programs.avals(eqn.outvars))

    def _on_every_node(self, eqn: JaxprEqn, ins: list[Value]) -> Sequence[Value]:
        outs = [self.new(a) for a in programs.avals(eqn.outvars)]
        if eqn.primitive.name == "broadcast_in_dim" and not ins[0].shape:
            self._full_of[outs[0].slot] = ins[0]
        return self.add(Plain(lambda *values: programs.bind(eqn, values)), ins, outs)

    def _with_numbers(self, op: Local, ins: list[Value]) -> tuple[Local, list[Value]]:
        """Takes the number itself for an array full of it, of which each node needs a part."""
        full = [
            self._full_of.get(v.slot) if want else None
            for v, want in zip(ins, op.wants, strict=True)
        ]
        if not any(full):
            return op, ins
        split = next(i for i, v in enumerate(ins) if v.layout)

        def run(*blocks: Array) -> Sequence[Array]:
            shape = blocks[split].shape
            every = zip(blocks, full, strict=True)
            return op.run(*(jnp.broadcast_to(b, shape) if f else b for b, f in every))

        wants = tuple(None if f else want for f, want in zip(full, op.wants, strict=True))
        operands = [f or v for f, v in zip(full, ins, strict=True)]
        return dataclasses.replace(op, run=run, wants=wants), operands

    def _custom(self, eqn: JaxprEqn, layouts: Sequence[Layout | None]) -> Local | None:
        """A function with a derivative of its own, if nodes can compute it alone."""
        found = self._alone(eqn.params["call_jaxpr"], layouts)
        if found is None:
            return None
        primal, gives = found

        @jax.custom_jvp
        def run(*blocks: Array) -> Sequence[Array]:
            return primal(*blocks)

        @run.defjvp
        def derivative(blocks: Sequence[Array], tangents: Sequence[Array]) -> Any:
            # Its program is made when somebody differentiates; it may call the function itself.
            thunk = eqn.params["jvp_jaxpr_fun"]
            jaxpr, consts, zeros = thunk.call_wrapped(*[False] * len(layouts))
            both = self._alone(ClosedJaxpr(jaxpr, consts), [*layouts, *layouts])
            if both is None or any(zeros):
                raise NotImplementedError(f"a derivative that mixes channels: {self.reason}")
            out = both[0](*blocks, *tangents)
            return out[: len(gives)], out[len(gives) :]

        return Local(run, tuple(layouts), gives)

    def _alone(
        self, program: ClosedJaxpr, layouts: Sequence[Layout | None]
    ) -> tuple[Callable[..., list[Array]], tuple[Layout | None, ...]] | None:
        """A whole program as one local operation, and how its results lie."""
        planner = _Planner(self.nodes, self._kinds, self._orders, Flow())
        avals = programs.avals(program.jaxpr.invars)
        values = [planner.new(a, layout) for a, layout in zip(avals, layouts, strict=True)]
        results = planner.walk(program.jaxpr, program.consts, values)
        flow = planner.flow
        ops = [step.op for step in flow.steps]
        aligned = all(isinstance(op, Plain) or (isinstance(op, Local) and op.aligned) for op in ops)
        if not aligned or flow.tables:
            return None

        def run(*blocks: Array) -> list[Array]:
            memory = dict(flow.constants) | {v.slot: b for v, b in zip(values, blocks, strict=True)}
            run_alone(flow.steps, memory)
            return [memory[v.slot] for v in results]

        return run, tuple(v.layout for v in results)

    def _wish(self, eqn: JaxprEqn, ins: Sequence[Value], cuts: Mapping[Any, programs.Cuts]) -> None:
        """Notes orders of the channels with which every node could compute this alone."""
        layout = ins[0].layout if ins else None
        if layout is None or not layout.maker:
            return
        if eqn.primitive.name == "reshape":
            sizes = eqn.params["new_sizes"]
            for order in orders_for_reshape(layout.axis, ins[0].shape, sizes, self.nodes):
                self.ask(layout, order)
        elif eqn.primitive.name in ("slice", "split"):
            ends = sorted(cuts[eqn.invars[0]].get(layout.axis, ()))
            if ends:
                equal = dealt(np.diff([0, *ends, layout.size]).tolist(), self.nodes)
                if equal is not None:
                    self.ask(layout, equal)

    def _reduced(self, eqn: JaxprEqn, value: Value) -> Value:
        """Over the split axis: every node reduces its own, and one number a node travels."""
        (aval,) = programs.avals(eqn.outvars)
        value = self.filled(value, _neutral(eqn.primitive.name, value.dtype))
        axis = len(aval.shape)
        layout = Layout(axis, np.arange(self.nodes)[:, None])

        def own(x: Array) -> Sequence[Array]:
            return [jnp.expand_dims(y, axis) for y in programs.bind(eqn, [x])]

        parts = jax.ShapeDtypeStruct((*aval.shape, self.nodes), aval.dtype)
        (part,) = self.local(Local(own, (value.layout,), (layout,), False), [value], [parts])
        together = Plain(lambda x: programs.bind(eqn, [x], axes=(axis,)))
        return self.add(together, [self.gathered(part)], [self.new(aval)])[0]

    def _call(self, eqn: JaxprEqn, value: Value) -> Value:
        """A layer of ours: what it reads, its call, and the shape that its author expects."""
        path, (aval,) = eqn.params["path"], programs.avals(eqn.outvars)
        kind, self.reason = self._kinds[path], f"layer {eqn.params['path']}"
        if not kind.fits(value.layout, len(value.shape)):
            self.flow.unfit[path] = _reason(kind, value)
            layout = value.layout if len(aval.shape) == len(value.shape) else None
            return self.new(aval, layout)  # a guess, so that all such layers are found at once
        read = self._readable(path, kind, value)
        order, maker = self._order(path, kind, read.layout)
        self.flow.outputs[path] = order
        dims = kind.dims or aval.shape[-1:]
        shape = (*aval.shape[: len(aval.shape) - len(dims)], math.prod(dims))
        made = jax.ShapeDtypeStruct(shape, aval.dtype)
        out = self.new(made, Layout(len(shape) - 1, order, maker))
        self.add(Call(path, dict(eqn.params["keywords"])), [read], [out])
        out = self.filled(out, 0)  # which also keeps gradients from dead channels
        self._clean.add(out.slot)
        return out if shape == aval.shape else self.reshaped(out, aval.shape)

    def _readable(self, path: str, kind: Kind, value: Value) -> Value:
        """The input as the layer reads it: one axis of channels, dead ones last and 0."""
        if kind.reads > 1:
            flat = math.prod(value.shape[-kind.reads :])
            value = self.reshaped(value, (*value.shape[: -kind.reads], flat))
        if value.layout is not None:
            last = value.layout.dead_last()
            value = self.lying(value, last if last and last.unit() else None)
        known = self.flow.inputs.setdefault(path, value.layout)
        value = self.lying(value, known and known.at(len(value.shape) - 1))
        value = self.filled(value, 0)
        self.flow.exchanged.setdefault(path, value.slot)
        return value

    def _order(self, path: str, kind: Kind, layout: Layout | None) -> tuple[Order, str]:
        """The order in which a layer computes its channels, and the layer that may change it."""
        order = kind.follows(layout) if layout else None
        if layout is None or order is None:
            usual = in_order(math.prod(kind.dims), self.nodes, math.prod(kind.dims[1:]))
            return self._orders.get(path, usual), path
        return order, layout.maker if np.array_equal(order, layout.order) else ""


def _reason(kind: Kind, value: Value) -> str:
    axes = len(value.shape)
    if kind.fits(None, axes + 1) and not kind.fits(None, axes):
        return "it is called without a batch axis"
    if value.layout is None:
        return "every node has all of its input"
    if value.layout.axis < len(value.shape) - kind.reads:
        return "it mixes another axis than the one that is split"
    return "its groups of channels do not divide by the nodes"


def _neutral(reduction: str, dtype: Any) -> Any:
    """What changes no result of the reduction."""
    kind = reduction.removeprefix("reduce_")
    if kind in ("sum", "or"):
        return 0
    if kind == "prod":
        return 1
    if kind == "and":
        return -1  # all bits
    if dtype == jnp.bool_:
        return kind == "min"
    if jnp.issubdtype(dtype, jnp.integer):
        ends = jnp.iinfo(dtype)
        return ends.min if kind == "max" else ends.max
    return -np.inf if kind == "max" else np.inf
