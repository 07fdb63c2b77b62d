"""Somebody else's Flax model, split over nodes as it is."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from disco_jax.errors import DiscoError, require
from disco_jax.exchange import Reader
from disco_jax.gather import Everywhere
from disco_jax.interop.distributed import Decisions, Distributed, Reading, Report
from disco_jax.interop.flow import Flow, Gathered, Order
from disco_jax.interop.foreign import Foreign, Norm, foreign, reader
from disco_jax.interop.planner import plan_flow
from disco_jax.interop.stand_in import Shapes, StandIn, Unfit
from disco_jax.mesh import NodeMesh
from disco_jax.rules import first_match
from disco_jax.trace import modules, name_exchanges, replace

log = logging.getLogger("disco_jax")
_SIZES = (224, 32, 28, 64, 96, 112, 128, 256, 299, 384, 512, 16, 8)


def distribute(
    model: nnx.Module,
    mesh: NodeMesh,
    images: Any = None,
    *,
    rules: Sequence[tuple[str, str]] = (),
) -> Distributed:
    """A copy of any NNX model whose layers are shared by the nodes, with the same numbers.

    ``nnx.Conv``, ``nnx.Linear``, ``nnx.LinearGeneral``, ``nnx.BatchNorm`` and ``nnx.LayerNorm``
    become layers of this library, those of ``nnx.MultiHeadAttention`` included; layers that read
    one tensor share its exchange. All other computation is followed operation by operation: most
    work on each node's own channels. An array of which every node needs all is gathered, and
    ``report`` says which, how large and for what.

    Args:
      model: a model as its author wrote it; it is not changed.
      mesh: the nodes.
      images: an example of the input, or its ``jax.ShapeDtypeStruct``, or a tuple of the call's
        arguments; by default images of a usual size that the model takes.
      rules: ``(pattern, "whole")`` leaves a layer whose path the pattern finds whole on every
        node; ``(pattern, "node")`` lets a ``LayerNorm`` normalise each node's own channels, which
        saves its exchange and is another function. The first rule that fits counts.

    Raises:
      DiscoError: if a rule fits no layer, no layer can be split, or no size of image fits.

    >>> model = distribute(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), NodeMesh(nodes=2, emulate=True))
    >>> model(np.ones((1, 4))).shape
    (1, 6)
    """
    inputs = _example(model, images)
    found = {path: kind for path, m in modules(model) if (kind := foreign(m)) is not None}
    chosen = first_match(rules, list(found))
    for pattern, rule in rules:
        require(
            rule in ("whole", "node"),
            f"`rules` entry ({pattern!r}, {rule!r}) must say 'whole' or 'node'; choose one",
        )
    whole = {path: "a rule" for path, rule in chosen.items() if rule == "whole"}
    whole |= dict.fromkeys(_tied(model, found), "other layers have the same weights")
    whole |= _foreign_to_us(model, found)
    kinds = {path: kind for path, kind in found.items() if path not in whole}
    flow = _decide(model, kinds, whole, inputs, mesh.nodes)
    require(
        bool(flow.outputs),
        f"`model` (={type(model).__name__}) has no layer that can be split: "
        + "; ".join(f"{path} ({why})" for path, why in whole.items())
        + "; build it from nnx.Conv, nnx.Linear or nnx.LinearGeneral",
    )
    scopes = {path: {"scope": "node"} for path, rule in chosen.items() if rule == "node"}
    whole |= {path: "it is not called" for path in kinds if path not in flow.outputs}
    distributed = _build(model, kinds, flow, whole, mesh, scopes)
    name_exchanges(distributed)
    if whole or distributed.report.gathers:
        log.warning("distribute(%s): %s", type(model).__name__, distributed.report)
    return distributed


def _example(model: nnx.Module, images: Any) -> tuple[Any, ...]:
    """Shapes of the inputs; where none are given, the first usual ones that the model takes."""
    if images is not None:
        inputs = images if isinstance(images, tuple) else (images,)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x, inputs
        )
    first = [getattr(m, "in_features", None) for _, m in modules(model)]
    flat = {f for f in first if isinstance(f, int)}
    shapes = [(1, size, size, channels) for channels in (3, 1) for size in _SIZES]
    result, error = Shapes(_abstract(model)), None
    for shape in [*shapes, *((1, f) for f in sorted(flat))]:
        example = jax.ShapeDtypeStruct(shape, np.float32)
        try:
            result(example)
        except Exception as raised:  # whatever the author's code raises for a wrong shape
            error = error or raised
            continue
        return (example,)
    raise DiscoError(
        f"`images` (=None) of model {type(model).__name__} cannot be guessed: it takes none of the "
        f"usual shapes, from {shapes[0]} to {shapes[-1]} (the first was refused with: {error}); "
        "pass an example, images=jax.ShapeDtypeStruct(shape, dtype)"
    )


def _foreign_to_us(model: nnx.Module, found: Mapping[str, Foreign]) -> dict[str, str]:
    """Layers with weights that stay as they are, whoever calls them."""
    whole = {}
    for path, module in modules(model):
        if path not in found and isinstance(getattr(module, "kernel", None), nnx.Variable):
            whole[path] = f"{type(module).__name__} is none of the layers that can be split"
        if isinstance(module, nnx.WeightNorm | nnx.SpectralNorm):
            inside = f"{path}.".lstrip(".")
            mine = [name for name in found if name.startswith(inside)]
            whole |= dict.fromkeys(mine, f"a {type(module).__name__} changes its weights")
    return whole


def _abstract(model: nnx.Module) -> nnx.Module:
    """The model without its numbers, in evaluation mode."""
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, jax.eval_shape(lambda: state))
    copy.eval()
    return copy


def _tied(model: nnx.Module, found: Mapping[str, Foreign]) -> list[str]:
    """Layers whose weights other modules hold, too."""
    owners: dict[int, set[str]] = {}
    for path, module in modules(model):
        for value in vars(module).values():
            if isinstance(value, nnx.Variable):
                owners.setdefault(id(value), set()).add(path)
    shared = [paths for paths in owners.values() if len(paths) > 1]
    return [path for path in found if any(path in paths for paths in shared)]


def _decide(
    model: nnx.Module,
    kinds: dict[str, Foreign],
    whole: dict[str, str],
    inputs: tuple[Any, ...],
    nodes: int,
) -> Flow:
    """The flow of a call; layers that cannot be split leave ``kinds`` for ``whole``."""
    while True:
        skeleton = with_stand_ins(_abstract(model), kinds)
        try:
            program = Reading(skeleton, kinds, inputs, {}).program
        except Unfit as unfit:
            del kinds[unfit.path]
            whole[unfit.path] = unfit.reason
            continue
        flow = best_flow(program, nodes, kinds)
        if not flow.unfit:
            return flow
        for path, reason in flow.unfit.items():
            del kinds[path]
            whole[path] = reason


def with_stand_ins(model: nnx.Module, kinds: Mapping[str, Foreign]) -> nnx.Module:
    """The model with a :class:`StandIn` in the place of each layer; in place but for the root."""
    found = dict(modules(model))
    stand_ins: dict[int, nnx.Module] = {id(found[p]): StandIn(found[p], p) for p in kinds}
    if "" in kinds:
        return stand_ins[id(model)]
    replace(model, stand_ins)
    return model


def best_flow(program: Any, nodes: int, kinds: Mapping[str, Foreign]) -> Flow:
    """The flow with most layers split and least to gather: tries what operations wish for."""
    orders: dict[str, Order] = {}
    best = plan_flow(program, nodes, kinds, orders)
    tried: set[tuple[str, bytes]] = set()
    while best.unfit or best.cost:
        wish = next((w for w in best.wishes if (w[0], w[1].tobytes()) not in tried), None)
        if wish is None:
            break
        tried.add((wish[0], wish[1].tobytes()))
        flow = plan_flow(program, nodes, kinds, {**orders, wish[0]: wish[1]})
        if (len(flow.unfit), flow.cost) < (len(best.unfit), best.cost):
            best = flow
            orders[wish[0]] = wish[1]
    return best


def _build(
    model: nnx.Module,
    kinds: Mapping[str, Foreign],
    flow: Flow,
    whole: Mapping[str, str],
    mesh: NodeMesh,
    settings: Mapping[str, Mapping[str, Any]],
) -> Distributed:
    used = {path: kinds[path] for path in flow.outputs}
    model = with_stand_ins(nnx.clone(model), used)
    stand_ins = {m.path: m for _, m in modules(model) if isinstance(m, StandIn)}
    readers: dict[tuple[int, int], Reader] = {}
    for path, kind in used.items():
        inputs, outputs = flow.inputs[path], flow.outputs[path]
        if isinstance(kind, Norm):
            layer = kind.build(outputs, mesh, **settings.get(path, {}))
        else:
            key = (flow.exchanged[path], min(kind.groups, 2))
            readers.setdefault(key, reader(kind, inputs, mesh))
            layer = kind.build(readers[key], inputs, outputs)
        stand_ins[path].layer = layer
    gathers = {s.op: s.ins[0].shape[1:] for s in flow.steps if isinstance(s.op, Gathered)}
    arrays = {op.name: (shape, op.why) for op, shape in gathers.items()}
    report = Report(tuple(used), dict(whole), arrays)
    distributed = Distributed(model, Decisions(used, flow, mesh.nodes), report, mesh)
    for op in gathers:
        distributed.gathers[op.name] = Everywhere(op.layout.width, mesh=mesh)
    return distributed
