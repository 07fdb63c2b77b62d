"""Somebody else's model once its layers are split: called as before."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.errors import TraceContextError
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array

from disco_jax.errors import DiscoError, require
from disco_jax.gather import Everywhere
from disco_jax.interop.execute import execute
from disco_jax.interop.flow import Call, Flow, Gathered, Value
from disco_jax.interop.foreign import Foreign
from disco_jax.interop.planner import plan_flow
from disco_jax.interop.stand_in import StandIn, Unfit
from disco_jax.mesh import NodeMesh
from disco_jax.trace import modules

log = logging.getLogger("disco_jax")


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What became of a model.

    Attributes:
      split: layers that the nodes share.
      whole: layers that every node computes with all their weights, each with the reason.
      gathers: arrays that every node needs all of, each with its shape (one example) and the
        operation that needs it.
    """

    split: tuple[str, ...]
    whole: Mapping[str, str]
    gathers: Mapping[str, tuple[tuple[int, ...], str]]

    def __str__(self) -> str:
        lines = [f"{len(self.split)} layers are split over the nodes"]
        lines += [f"whole on every node: {path} ({why})" for path, why in self.whole.items()]
        lines += [
            f"gathered: {name} {list(shape)}, {4 * math.prod(shape):,} bytes, for {why}"
            for name, (shape, why) in self.gathers.items()
        ]
        return "\n".join(lines)


class Decisions:
    """How the layers were laid out: the same for a model and all its clones."""

    def __init__(self, kinds: Mapping[str, Foreign], flow: Flow, nodes: int):
        # Without the originals, whose weights are in our layers now.
        self.kinds = {path: dataclasses.replace(k, original=None) for path, k in kinds.items()}
        self.inputs, self.outputs, self.nodes = dict(flow.inputs), dict(flow.outputs), nodes
        self.stand_ins = frozenset(kinds)

    def plan(self, program: ClosedJaxpr) -> Flow:
        """The steps of a call.

        Raises:
          DiscoError: if a layer is used in another way than when the model was distributed.
        """
        flow = plan_flow(program, self.nodes, self.kinds, self.outputs, self.inputs)
        odd = sorted(flow.unfit)
        require(
            not odd,
            f"`{odd[0] if odd else ''}` is called in another way than when the model was "
            "distributed; pass rules=[(its path, 'whole')] to dj.distribute, or images like these",
        )
        return flow


class Distributed(nnx.Module):
    """A model that its author wrote for one device, on several nodes; called like the original.

    Its Flax layers are layers of this library, and everything between them runs on each node's own
    channels. What cannot, is gathered by exchanges of their own that the plan counts. ``freeze``,
    ``sparsify`` and the rest take it like any model of this library.

    Attributes:
      model: the author's modules, :class:`StandIn` in the places of the layers.
      gathers: the exchanges of whole arrays.
      report: what became of the layers.
    """

    by_channels = True  # alone: dj.split does not know its layers

    def __init__(self, model: nnx.Module, decisions: Decisions, report: Report, mesh: NodeMesh):
        self.model = model
        self.mesh = mesh
        self.report = report
        self.gathers: nnx.Dict = nnx.Dict({})
        self._decisions = decisions

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            call = Reading(self.model, self._decisions.stand_ins, arguments, keywords)
        except Unfit as unfit:
            raise DiscoError(
                f"`{unfit.path}` cannot be split in this call: {unfit.reason}; pass "
                f"rules=[({unfit.path!r}, 'whole')] to dj.distribute"
            ) from None
        flow = self._decisions.plan(call.program)
        return call.finish(self.run(flow, call.arrays))

    def run(self, flow: Flow, arrays: Sequence[Array]) -> list[Array]:
        layers: dict[str, Any] = {
            m.path: m.layer for _, m in modules(self.model) if isinstance(m, StandIn)
        }
        readable: dict[tuple[int, int], Any] = {}

        def call(step: Call, value: Value, x: Array) -> Array:
            layer = layers[step.path]
            exchange = getattr(layer, "exchange", None)
            if exchange is None:
                norm = isinstance(layer, nnx.BatchNorm)
                return layer(x, **step.keywords) if norm else layer(x)
            key = (value.slot, id(exchange))
            if key not in readable:
                readable[key] = exchange(x)
            return layer(readable[key])

        def gather(step: Gathered, x: Array) -> Array:
            if step.name in self.gathers:
                return self.gathers[step.name](x)
            made = Everywhere(step.layout.width, mesh=self.mesh)
            # Under a transformation of JAX's the model cannot be changed.
            with contextlib.suppress(TraceContextError):
                self.gathers[step.name] = made
            return made(x)

        return execute(flow, arrays, self.mesh, call, gather)


class Reading:
    """One call of a model as a program, our layers not looked into."""

    def __init__(
        self,
        model: nnx.Module,
        stand_ins: Collection[str],
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
    ):
        graph, state = nnx.split(model)
        flat = nnx.to_flat_state(state)
        self._model = model
        self._own = [(p, v) for p, v in flat if not _under(p, stand_ins)]
        layers = [(p, v) for p, v in flat if _under(p, stand_ins)]
        tree: Any
        _refuse_state((arguments, keywords))
        leaves, tree = jax.tree.flatten((tuple(arguments), dict(keywords)))
        dynamic = [_is_array(leaf) for leaf in leaves]
        given = [leaf for leaf, d in zip(leaves, dynamic, strict=True) if d]

        def call(own: list[Any], given: list[Any]) -> tuple[Any, list[Any]]:
            rest = iter(given)
            args, kwargs = tree.unflatten(
                next(rest) if d else leaf for leaf, d in zip(leaves, dynamic, strict=True)
            )
            variables = [(p, v.replace(x)) for (p, v), x in zip(self._own, own, strict=True)]
            ours = [(p, v.replace(v.get_value())) for p, v in layers]
            merged: Any = nnx.merge(graph, nnx.from_flat_state([*variables, *ours]))
            out = merged(*args, **kwargs)
            after = dict(nnx.to_flat_state(nnx.state(merged)))
            new = sorted(".".join(map(str, p)) for p in after.keys() - {p for p, _ in flat})
            if new:
                log.warning("what the call adds to the model is not kept: %s", ", ".join(new))
            return out, [after[p].get_value() for p, _ in self._own]

        own = [v.get_value() for _, v in self._own]
        self.arrays = [*own, *given]
        # Without shardings, which would become equations.
        bare = [[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs] for xs in (own, given)]
        self.program, (shapes, _) = jax.make_jaxpr(call, return_shape=True)(*bare)
        self._tree: Any = jax.tree.structure(shapes)

    def finish(self, results: Sequence[Array]) -> Any:
        """Puts changed variables back, and returns what the model returns."""
        out = self._tree.num_leaves
        before = self.program.jaxpr.invars
        after = self.program.jaxpr.outvars[out:]
        changed = [
            (path, variable.replace(value))
            for (path, variable), old, new, value in zip(
                self._own, before, after, results[out:], strict=False
            )
            if old is not new
        ]
        if changed:
            nnx.update(self._model, nnx.from_flat_state(changed))
        return jax.tree.unflatten(self._tree, results[:out])


def _under(path: tuple[Any, ...], stand_ins: Collection[str]) -> bool:
    return any(".".join(map(str, path[:i])) in stand_ins for i in range(len(path)))


def _refuse_state(arguments: Any) -> None:
    """What a call changes in its arguments would be lost."""
    state = (nnx.Module, nnx.Rngs, nnx.RngStream, nnx.Variable)
    for leaf in jax.tree.leaves(arguments, is_leaf=lambda leaf: isinstance(leaf, state)):
        require(
            not isinstance(leaf, state),
            f"an argument of the distributed model is a {type(leaf).__name__}, whose changes would "
            "be lost; give it to the model when it is made, and arrays to the call",
        )


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
