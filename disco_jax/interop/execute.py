"""Runs a flow: layers and exchanges one by one, and what lies between them on every node alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from disco_jax.interop.flow import Call, Flow, Gathered, Plain, Step, Value, run_alone
from disco_jax.interop.layout import Layout
from disco_jax.interop.local import Local
from disco_jax.mesh import NODE, NodeMesh

Memory = dict[int, Any]


def execute(
    flow: Flow,
    arguments: Sequence[Array],
    mesh: NodeMesh,
    call: Callable[[Call, Value, Array], Array],
    gather: Callable[[Gathered, Array], Array],
) -> list[Array]:
    """The results of a flow.

    Args:
      flow: from ``plan_flow``.
      arguments: those of the program, held by every node.
      mesh: where it runs.
      call: runs a layer of ours.
      gather: brings every node the blocks of all, ``[b, ..., n*p] -> [b, ..., n*p]``.
    """
    memory: Memory = dict(flow.constants) | dict(flow.tables)
    memory |= {v.slot: x for v, x in zip(flow.arguments, arguments, strict=True)}
    last_use = {v.slot: i for i, step in enumerate(flow.steps) for v in step.ins}
    last_use |= {v.slot: len(flow.steps) for v in flow.results}
    segment: list[Step] = []
    for i, step in enumerate(flow.steps):
        if isinstance(step.op, Local):
            segment.append(step)
            continue
        if not isinstance(step.op, Plain):  # which reads nothing that is split
            _run_segment(segment, memory, mesh, {s for s, last in last_use.items() if last >= i})
            segment = []
        values = [memory[v.slot] for v in step.ins]
        if isinstance(step.op, Call):
            results: Sequence[Array] = [call(step.op, step.ins[0], values[0])]
        elif isinstance(step.op, Gathered):
            results = [_gathered(step.op, values[0], gather)]
        else:
            results = step.op.run(*values)
        memory |= {v.slot: x for v, x in zip(step.outs, results, strict=True)}
    _run_segment(segment, memory, mesh, {v.slot for v in flow.results})
    return [memory[v.slot] for v in flow.results]


def _gathered(op: Gathered, x: Array, gather: Callable[[Gathered, Array], Array]) -> Array:
    if x.ndim == 1:  # without a batch
        layout = op.layout.at(1)
        return _gathered(dataclasses.replace(op, layout=layout), x[None], gather)[0]
    axis = op.layout.axis
    whole = jnp.moveaxis(gather(op, jnp.moveaxis(x, axis, -1)), -1, axis)
    if _one_block(whole, op.layout):  # a single node's share of a program hears only itself
        whole = jnp.concatenate([whole] * op.layout.nodes, axis)
    return whole if op.layout.plain else jnp.take(whole, op.layout.positions(), axis)


def _run_segment(steps: Sequence[Step], memory: Memory, mesh: NodeMesh, needed: set[int]) -> None:
    """Runs steps that every node does on its own blocks, without a word to the others."""
    if not steps:
        return
    made = {v.slot: v for step in steps for v in step.outs}
    read = {v.slot: v for step in steps for v in step.ins if v.slot not in made}
    kept = [v for slot, v in made.items() if slot in needed]
    if not mesh.distributed:
        for step in steps:
            memory.update(_on_one_device(step, memory))
        return

    def on_node(*blocks: Array) -> list[Array]:
        own = dict(zip(read, blocks, strict=True))
        run_alone(steps, own)
        return [own[v.slot] for v in kept]

    results = jax.shard_map(
        on_node,
        mesh=mesh.jax_mesh,
        in_specs=tuple(_spec(v.layout) for v in read.values()),  # a block, or all of it
        out_specs=[_spec(v.layout) for v in kept],  # a block of each
        axis_names={NODE} if mesh.data > 1 else set(mesh.jax_mesh.axis_names),
        check_vma=False,  # constants and what all nodes hold meet blocks without a cast
    )(*(memory[slot] for slot in read))
    memory |= {v.slot: x for v, x in zip(kept, results, strict=True)}


def _spec(layout: Layout | None) -> P:
    return P() if layout is None else P(*[None] * layout.axis, NODE)


def _on_one_device(step: Step, memory: Memory) -> Memory:
    """One device plays all nodes, or is one of them and has its blocks alone."""
    op, layouts = step.op, [v.layout for v in step.ins]
    assert isinstance(op, Local)
    values = [memory[v.slot] for v in step.ins]
    if any(_one_block(x, layout) for x, layout in zip(values, layouts, strict=True)):
        results = op.run(*(_own(x, layout) for x, layout in zip(values, layouts, strict=True)))
    elif op.aligned:
        results = op.run(*values)
    else:
        results = jax.vmap(
            lambda *blocks: list(op.run(*blocks)),
            in_axes=tuple(layout and layout.axis for layout in layouts),
            out_axes=[layout.axis for layout in op.gives if layout],
        )(*(_blocks(x, layout) for x, layout in zip(values, layouts, strict=True)))
        results = [_together(x, layout) for x, layout in zip(results, op.gives, strict=True)]
    return {v.slot: x for v, x in zip(step.outs, results, strict=True)}


def _one_block(x: Array, layout: Layout | None) -> bool:
    return layout is not None and layout.nodes > 1 and x.shape[layout.axis] == layout.width


def _own(x: Array, layout: Layout | None) -> Array:
    """Of what is the same for all nodes, the first one's part."""
    return x if layout is None else jax.lax.slice_in_dim(x, 0, layout.width, axis=layout.axis)


def _blocks(x: Array, layout: Layout | None) -> Array:
    """``[..., n*p, ...] -> [..., n, p, ...]``."""
    if layout is None:
        return x
    a = layout.axis
    return jnp.reshape(x, (*x.shape[:a], layout.nodes, layout.width, *x.shape[a + 1 :]))


def _together(x: Array, layout: Layout | None) -> Array:
    if layout is None:
        return x
    a = layout.axis
    return jnp.reshape(x, (*x.shape[:a], layout.nodes * layout.width, *x.shape[a + 2 :]))
