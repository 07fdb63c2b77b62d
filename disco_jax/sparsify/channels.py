"""Which axes of which parameters share one order of channels, read off a model's jaxpr.

Renumbering the channels of a layer leaves a network unchanged if everything that meets them is
renumbered with it: the layer's outputs, the norm behind it, the inputs of all that read it and,
along a residual stream, every layer that adds to it. The dependency graph of structured pruning
(Fang et al. 2023, arXiv 2301.12900), here by union-find over the axes of all intermediate arrays.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from disco_jax.layers.norm import LayerNorm
from disco_jax.mesh import NodeMesh
from disco_jax.trace import Images, modules

# One name a line would fill a screen.
_NAMES = """
abs add and clamp convert_element_type copy cos div eq erf erf_inv erfc exp exp2 expm1 ge gt
integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow rem round rsqrt
select_n sign sin sqrt square stop_gradient sub tanh xor
"""
ELEMENTWISE = frozenset(_NAMES.split())
REDUCTIONS = frozenset(f"reduce_{kind}" for kind in ("sum", "max", "min", "prod", "and", "or"))
INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclasses.dataclass(frozen=True)
class Channels:
    """Axes of one order: ``axes`` are (path of a variable, axis), all of ``size`` entries."""

    size: int
    axes: tuple[tuple[str, int], ...]


def channel_orders(model: nnx.Module, images: Images) -> list[Channels]:
    """The orders of channels of a model that may be changed without changing what it computes.

    Inputs, outputs, and axes that meet an operation this analysis does not know, keep theirs.

    Args:
      model: a masked model.
      images: the input, or its ``jax.ShapeDtypeStruct``.
    """
    model = _undivided(model)
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    names = [".".join(map(str, path)) for path, _ in flat]
    leaves = [variable[...] for _, variable in flat]
    restore = nnx.from_flat_state

    def call(leaves: list[Any], images: Any) -> Any:
        merged: Any = nnx.merge(
            graphdef,
            restore([(p, v.replace(x)) for (p, v), x in zip(flat, leaves, strict=True)]),
        )
        return merged(images)

    shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
    jaxpr = jax.make_jaxpr(call)(leaves, shape).jaxpr
    ties = _Ties()
    parameters = [ties.new(v.aval.ndim) for v in jaxpr.invars[: len(names)]]
    image = ties.new(shape.ndim, fixed=True)
    for axes in ties.walk(jaxpr, [*parameters, image]):
        ties.fix(axes)
    orders: dict[int, list[tuple[str, int]]] = {}
    for name, axes in zip(names, parameters, strict=True):
        for i, axis in enumerate(axes):
            orders.setdefault(ties.find(axis), []).append((name, i))
    shapes = dict(zip(names, (x.shape for x in leaves), strict=True))
    return [
        Channels(shapes[axes[0][0]][axes[0][1]], tuple(axes))
        for root, axes in orders.items()
        if root not in ties.fixed_roots() and shapes[axes[0][0]][axes[0][1]] > 1
    ]


def _undivided(model: nnx.Module) -> nnx.Module:
    """The same model in evaluation mode on one node, without masks and communication.

    A norm over each node's own channels stays divided: it is another function on one node.
    """
    model = nnx.clone(model)
    model.eval()
    for _, module in modules(model):
        if hasattr(module, "mesh"):
            divided = isinstance(module, LayerNorm) and module.statistics is None
            module.mesh = NodeMesh(module.mesh.nodes if divided else 1, emulate=True)
    return model


class _Ties:
    """Union-find over axes; ``walk`` ties what must have one order."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.fixed: list[int] = []

    def new(self, ndim: int, *, fixed: bool = False) -> list[int]:
        axes = list(range(len(self.parent), len(self.parent) + ndim))
        self.parent += axes
        if fixed:
            self.fix(axes)
        return axes

    def find(self, axis: int) -> int:
        while self.parent[axis] != axis:
            self.parent[axis] = self.parent[self.parent[axis]]
            axis = self.parent[axis]
        return axis

    def tie(self, a: int, b: int) -> None:
        self.parent[self.find(a)] = self.find(b)

    def fix(self, axes: list[int]) -> None:
        self.fixed += axes

    def fixed_roots(self) -> set[int]:
        return {self.find(axis) for axis in self.fixed}

    def walk(self, jaxpr: Any, inputs: list[list[int]]) -> list[list[int]]:
        """Axes of the outputs, given those of the inputs."""
        axes = dict(zip(jaxpr.invars, inputs, strict=True))
        axes |= {v: self.new(len(v.aval.shape), fixed=True) for v in jaxpr.constvars}

        def read(atom: Any) -> list[int]:
            literal = isinstance(atom, core.Literal)
            return self.new(jnp.ndim(atom.val)) if literal else axes[atom]

        for eqn in jaxpr.eqns:
            given = [read(v) for v in eqn.invars]
            inner = next((eqn.params[k] for k in INNER if k in eqn.params), None)
            if inner is not None and len(getattr(inner, "jaxpr", inner).invars) == len(given):
                found = self.walk(getattr(inner, "jaxpr", inner), given)
            else:
                found = [self.new(v.aval.ndim) for v in eqn.outvars]
                self.apply(eqn, given, found)
            axes |= dict(zip(eqn.outvars, found, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def apply(self, eqn: Any, given: list[list[int]], found: list[list[int]]) -> None:
        """Ties inputs and outputs of one operation; fixes what it does not understand."""
        name, params = eqn.primitive.name, eqn.params
        shapes = [v.aval.shape for v in eqn.invars]
        out_shape, out = eqn.outvars[0].aval.shape, found[0]
        pairs: list[tuple[int, int]] = []
        if name in ELEMENTWISE:
            full = [(x, shape) for x, shape in zip(given, shapes, strict=True) if shape]
            pairs = [
                (a, b)
                for axes, shape in full
                for a, b, size, out_size in zip(axes, out, shape, out_shape, strict=True)
                if size == out_size
            ]
        elif name == "conv_general_dilated":
            pairs = self.convolution(params, given, shapes, out)
        elif name == "dot_general":
            pairs = _dot(params, given, out)
        elif name == "broadcast_in_dim":
            kept = zip(given[0], shapes[0], params["broadcast_dimensions"], strict=True)
            pairs = [(a, out[d]) for a, size, d in kept if size == out_shape[d]]
        elif name == "transpose":
            pairs = [(given[0][d], out[i]) for i, d in enumerate(params["permutation"])]
        elif name in REDUCTIONS:
            left = [a for i, a in enumerate(given[0]) if i not in params["axes"]]
            pairs = list(zip(left, out, strict=True))
        elif name == "squeeze":
            left = [a for i, a in enumerate(given[0]) if i not in params["dimensions"]]
            pairs = list(zip(left, out, strict=True))
        elif name == "reshape":
            pairs = [(given[0][i], out[j]) for i, j in _kept_axes(shapes[0], out_shape)]
        elif name.startswith("reduce_window"):
            windows = params["window_dimensions"]
            pairs = [(a, b) for a, b, w in zip(given[0], out, windows, strict=True) if w == 1]
        elif name == "concatenate":
            along = params["dimension"]
            pairs = [(x[i], out[i]) for x in given for i in range(len(out)) if i != along]
        elif name in ("slice", "pad"):
            whole = [a == b for a, b in zip(shapes[0], out_shape, strict=True)]
            pairs = [(a, b) for a, b, same in zip(given[0], out, whole, strict=True) if same]
        tied = {axis for pair in pairs for axis in pair}
        for a, b in pairs:
            self.tie(a, b)
        free = self.free_axes(name, params, given, out)
        for axes in (*given, *found):
            self.fix([a for a in axes if a not in tied and a not in free])

    def free_axes(self, name: str, params: Any, given: Any, out: list[int]) -> set[int]:
        """Axes that an operation leaves untied although it treats all their entries alike."""
        if name in REDUCTIONS:
            return {given[0][i] for i in params["axes"]}
        if name == "broadcast_in_dim":
            return set(given[0]) | set(out)
        if name in ELEMENTWISE:
            return set(out).union(*given)
        return set()

    def convolution(
        self, params: Any, given: list[list[int]], shapes: list[Any], out: list[int]
    ) -> list[tuple[int, int]]:
        lhs, rhs = given
        numbers = params["dimension_numbers"]
        batch = (lhs[numbers.lhs_spec[0]], out[numbers.out_spec[0]])
        outputs = (rhs[numbers.rhs_spec[0]], out[numbers.out_spec[1]])
        inputs = (lhs[numbers.lhs_spec[1]], rhs[numbers.rhs_spec[1]])
        groups, features = params["feature_group_count"], shapes[0][numbers.lhs_spec[1]]
        if groups == 1:
            return [batch, outputs, inputs]
        if groups == features == shapes[1][numbers.rhs_spec[0]]:
            return [batch, outputs, (inputs[0], outputs[1])]
        return [batch]


def _dot(params: Any, given: list[list[int]], out: list[int]) -> list[tuple[int, int]]:
    (contract_l, contract_r), (batch_l, batch_r) = params["dimension_numbers"]
    lhs, rhs = given
    pairs = [(lhs[i], rhs[j]) for i, j in zip(contract_l, contract_r, strict=True)]
    pairs += [(lhs[i], rhs[j]) for i, j in zip(batch_l, batch_r, strict=True)]
    result = [lhs[i] for i in batch_l]
    result += [a for i, a in enumerate(lhs) if i not in (*contract_l, *batch_l)]
    result += [a for i, a in enumerate(rhs) if i not in (*contract_r, *batch_r)]
    return [*pairs, *zip(result, out, strict=True)]


def _kept_axes(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[int, int]]:
    """Axes that a reshape leaves as they are, because as much lies before (and behind) them.

    >>> _kept_axes((2, 7, 7, 8), (2, 49, 8))
    [(0, 0), (3, 2)]
    """
    starts = {math.prod(after[:j]): j for j, size in enumerate(after) if size > 1}
    found = [(i, starts.get(math.prod(before[:i]))) for i, size in enumerate(before) if size > 1]
    return [(i, j) for i, j in found if j is not None and before[i] == after[j]]
