"""Questions to a jaxpr: what is inside an equation, where it was written, where an array is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jaxtyping import Array

from disco_jax.interop.stand_in import layer_p
from disco_jax.sparsify.channels import INNER

Cuts = dict[int, set[int]]


def bind(eqn: JaxprEqn, values: Sequence[Array], **changes: Any) -> Sequence[Array]:
    """Computes an equation, some of its parameters changed."""
    found = eqn.primitive.get_bind_params({**eqn.params, **changes})
    functions, params = found if isinstance(found, tuple) else ((), found)  # before JAX 0.10
    out = eqn.primitive.bind(*functions, *values, **params)
    return out if eqn.primitive.multiple_results else [out]


def avals(variables: Sequence[Any]) -> list[Any]:
    """Shapes and dtypes."""
    return [v.aval for v in variables]


def inner_program(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The one program that an equation calls, if it calls one."""
    for name in INNER:
        found = eqn.params.get(name)
        if isinstance(found, ClosedJaxpr):
            return found
        if isinstance(found, Jaxpr):
            return ClosedJaxpr(found, ())
    return None


def layers_in(jaxpr: Jaxpr) -> set[str]:
    """Paths of the layers of ours in a program, and in those that it calls."""
    found = {eqn.params["path"] for eqn in jaxpr.eqns if eqn.primitive is layer_p}
    return found.union(*(layers_inside(eqn) for eqn in jaxpr.eqns))


def layers_inside(eqn: JaxprEqn) -> set[str]:
    """Paths of the layers of ours in the programs that an equation calls."""
    program = (ClosedJaxpr, Jaxpr)
    values = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: isinstance(v, program))
    found: set[str] = set()
    for value in values:
        if isinstance(value, program):
            found |= layers_in(value.jaxpr if isinstance(value, ClosedJaxpr) else value)
    return found


def cuts(jaxpr: Jaxpr) -> dict[Any, Cuts]:
    """Where slices cut each array: axis -> positions."""
    found: dict[Any, Cuts] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "slice":
            ends = list(zip(eqn.params["start_indices"], eqn.params["limit_indices"], strict=True))
            along = list(enumerate(ends))
        elif eqn.primitive.name == "split":
            along = [(eqn.params["axis"], np.cumsum(eqn.params["sizes"]).tolist())]
        else:
            continue
        (shape,) = (aval.shape for aval in avals(eqn.invars))
        for axis, positions in along:
            inside = {int(p) for p in positions if 0 < p < shape[axis]}
            found.setdefault(eqn.invars[0], {}).setdefault(axis, set()).update(inside)
    return found


def source(eqn: JaxprEqn) -> str:
    """File and line of the author's code, "" if it is not known."""
    trace: Any = eqn.source_info.traceback
    for frame in trace.frames if trace else ():
        if not any(f"/{package}/" in frame.file_name for package in ("jax", "flax", "disco_jax")):
            return f"({frame.file_name.rsplit('/', 1)[-1]}:{frame.line_num})"
    return ""
