"""Masks -> plan -> packed model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from disco_jax import wire
from disco_jax.errors import require
from disco_jax.exchange import Exchange
from disco_jax.gather import AllGather
from disco_jax.layers.attention import DotProductAttention
from disco_jax.mesh import NODE, NodeMesh
from disco_jax.packed import Hop, PackedExchange, received_channels
from disco_jax.plan.fold import fold_norms
from disco_jax.plan.frozen import Frozen, mesh_of
from disco_jax.plan.liveness import peak_bytes
from disco_jax.plan.spec import CommunicationPlan, ExchangePlan, LayerPlan
from disco_jax.sparsify.quantise import WireDtype, wire_dtypes, wire_scales
from disco_jax.trace import (
    ExchangeRecord,
    Images,
    LayerRecord,
    Trace,
    exchanges,
    modules,
    readers,
    replace,
    trace,
)


def plan_hops(mask: Bool[np.ndarray, "n c"]) -> tuple[Hop, ...]:
    """The messages that bring every node the channels of its mask row; empty hops are left out.

    >>> plan_hops(np.array([[1, 1, 0, 1], [0, 0, 1, 1]], bool))
    (Hop(offset=1, sends=((), (1,))),)
    """
    nodes, channels = mask.shape
    block = channels // nodes
    blocks = mask.reshape(nodes, nodes, block)  # [reader, owner, channel]
    hops = []
    for offset in range(1, nodes):
        sends = tuple(
            tuple(np.flatnonzero(blocks[(s + offset) % nodes, s]).tolist()) for s in range(nodes)
        )
        if any(sends):
            hops.append(Hop(offset, sends))
    return tuple(hops)


def split_hops(hops: tuple[Hop, ...], most: int) -> tuple[Hop, ...]:
    """The same messages in pieces of at most ``most`` channels.

    >>> split_hops((Hop(1, ((), (0, 1, 2))),), 2)
    (Hop(offset=1, sends=((), (0, 1))), Hop(offset=1, sends=((), (2,))))
    """
    return tuple(
        Hop(hop.offset, tuple(sent[i : i + most] for sent in hop.sends))
        for hop in hops
        for i in range(0, hop.width, most)
    )


def readable_channels(hops: tuple[Hop, ...], nodes: int, channels: int) -> Int[np.ndarray, "n r"]:
    """Global index of each channel in the nodes' readable blocks, own first; -1 is fill."""
    own = np.arange(channels).reshape(nodes, -1)
    return np.concatenate([own, received_channels(hops, nodes, channels // nodes)], axis=1)


def pack_kernel(
    kernel: Float[Array, "... c_in c_out"], readable: Int[np.ndarray, "n r"]
) -> Float[Array, "n ... r o"]:
    """Each node's rows of readable channels and columns of own outputs; rows of fill are zero."""
    blocks = jnp.split(kernel, len(readable), axis=-1)
    packed = [
        jnp.take(block, jnp.maximum(rows, 0), axis=-2) * (rows >= 0)[:, None].astype(block.dtype)
        for rows, block in zip(readable, blocks, strict=True)
    ]
    return jnp.stack(packed)


def freeze(
    model: nnx.Module,
    images: Images,
    *,
    wire_dtype: WireDtype = None,
    mesh: NodeMesh | None = None,
    message_bytes: int | None = None,
) -> Frozen:
    """Freezes the masks of a model into a plan, and packs the model accordingly.

    Batch normalisations become part of the layers before them, where they can.

    Args:
      model: a masked model; it is not changed.
      images: an example input (or its ``jax.ShapeDtypeStruct``); only shape and dtype are used,
        but for integers, which take the range of every channel from them: a few hundred images.
      wire_dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"int8"`` or ``"int4"``, or rules
        ``(pattern, wire_dtype)``, the first of which counts that is found in an exchange's path.
        None sends what the model was quantised to, or else what is computed.
      mesh: where the packed model is to run, the model's own mesh by default.
      message_bytes: what a message has at most per example; larger ones go in pieces, one after
        another. On several hosts 100_000 is better than none: of larger messages gloo sends only
        the first 100 KB while it receives, then the two directions take turns.

    Returns:
      The packed model, compiled on its first call.

    Raises:
      DiscoError: if the mesh has another number of nodes, the wire dtype is not one or has no
        images to be calibrated on, or the model has no exchange.
    """
    found = exchanges(model)
    require(
        bool(found),
        f"`model` (={type(model).__name__}) has no masked exchange; pass a model made of "
        "disco_jax layers that is not frozen already",
    )
    nodes = next(iter(found.values())).mesh.nodes
    require(
        mesh is None or mesh.nodes == nodes,
        f"`nodes` of the mesh (={mesh and mesh.nodes}) must be those of the model (={nodes}); "
        f"pass mesh=NodeMesh(nodes={nodes})",
    )
    traced = trace(model, images)
    dtypes, scales = _wires(model, images, wire_dtype)
    dtypes = {r.path: r.dtype for r in traced.exchanges} | dtypes
    hops = _hops(found, traced, dtypes, message_bytes)
    packed = nnx.clone(model)
    fold_norms(packed, images)
    if mesh is not None:
        move(packed, mesh)
    _pack(packed, hops, dtypes, scales)
    packed.eval()
    plan = _plan(packed, trace(packed, images), _peak_activation_bytes(packed, images))
    return Frozen(packed, plan)


def move(model: nnx.Module, mesh: NodeMesh) -> None:
    """Moves a model to another mesh of as many nodes, in place."""
    for _, module in modules(model):
        if hasattr(module, "mesh"):
            module.mesh = mesh
        for variable in vars(module).values():
            value = variable.get_value() if isinstance(variable, nnx.Variable) else None
            if isinstance(value, jax.Array):
                variable.set_value(_moved(value, mesh))


def _moved(value: jax.Array, mesh: NodeMesh) -> jax.Array:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = _moved(jax.random.key_data(value), mesh)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    return mesh.put(np.asarray(value), *getattr(value.sharding, "spec", ()))


def _hops(
    found: Mapping[str, Exchange], traced: Trace, dtypes: Mapping[str, str], most: int | None
) -> dict[str, tuple[Hop, ...]]:
    """The messages of every exchange, of ``most`` bytes at most."""
    hops = {path: plan_hops(np.asarray(e.mask[...])) for path, e in found.items()}
    if most is None:
        return hops
    require(most >= 1, f"`message_bytes` (={most}) must be at least 1; 100_000 is usual")
    channels = {
        r.path: max(1, most // wire.message_bytes(r.positions, dtypes[r.path]))
        for r in traced.exchanges
        if r.path in hops
    }
    return hops | {path: split_hops(hops[path], count) for path, count in channels.items()}


def _wires(
    model: nnx.Module, images: Images, wire_dtype: WireDtype
) -> tuple[dict[str, str], dict[str, Float[np.ndarray, "2 c"]]]:
    """Wire dtypes and scales: those asked for, or those that the model was quantised to."""
    found = exchanges(model)
    if wire_dtype is not None:
        dtypes = wire_dtypes(list(found), wire_dtype)
        return dtypes, wire_scales(model, images, dtypes)
    rounding = {path: e for path, e in found.items() if e.wire_dtype is not None}
    scales = {p: np.asarray(e.scale[...]) for p, e in rounding.items() if e.scale is not None}
    return {path: str(e.wire_dtype) for path, e in rounding.items()}, scales


def _pack(
    model: nnx.Module,
    hops: dict[str, tuple[Hop, ...]],
    dtypes: dict[str, str],
    scales: dict[str, Float[np.ndarray, "2 c"]],
) -> None:
    """Replaces every masked exchange, and the kernels that read it."""
    readable, kernels, layers = [], [], []
    reading = readers(model)
    for path, exchange in exchanges(model).items():
        index = readable_channels(hops[path], exchange.mesh.nodes, exchange.channels)
        for _, layer in reading[path]:
            readable.append(index)
            kernels.append(layer.kernel[...])
            layers.append(layer)
    pack = jax.jit(  # one program, not one for each shape
        lambda kernels: [pack_kernel(*pair) for pair in zip(kernels, readable, strict=True)],
        out_shardings=[layer.mesh.sharding(NODE) for layer in layers],
    )
    for layer, kernel in zip(layers, pack(kernels), strict=True):
        layer.kernel = nnx.Param(kernel)
    replace_exchanges(model, hops, dtypes, scales)


def replace_exchanges(
    model: nnx.Module,
    hops: Mapping[str, tuple[Hop, ...]],
    dtypes: Mapping[str, str],
    scales: Mapping[str, Float[np.ndarray, "2 c"]],
) -> None:
    """Puts a packed exchange where a masked one was, in place; kernels stay as they are."""
    replacement: dict[int, nnx.Module] = {
        id(e): PackedExchange(e, hops.get(path, ()), dtypes.get(path, "float32"), scales.get(path))
        for path, e in exchanges(model).items()
    }
    replace(model, replacement)


def _plan(model: nnx.Module, packed: Trace, peak_activation_bytes: int) -> CommunicationPlan:
    found: dict[str, Any] = dict(modules(model))
    calls: dict[str, list[ExchangeRecord]] = {}
    for record in packed.exchanges:
        calls.setdefault(record.path, []).append(record)
    layers: dict[str, list[LayerRecord]] = {}
    for layer in packed.layers:
        layers.setdefault(layer.path, []).append(layer)
    nodes = next(m.mesh.nodes for m in found.values() if isinstance(m, PackedExchange))
    return CommunicationPlan(
        nodes,
        tuple(_exchange_plan(found[path], records) for path, records in calls.items()),
        tuple(_layer_plan(found[path], records) for path, records in layers.items()),
        peak_activation_bytes,
    )


def _peak_activation_bytes(model: nnx.Module, images: Images) -> int:
    """What a node of a packed model holds of one example; all of them hold as much."""
    mesh = mesh_of(model)
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.eval_shape(lambda state: state, state))
    move(model, mesh.abstract())
    graphdef, state = nnx.split(model)
    example = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    program = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, example)
    return peak_bytes(program, mesh.nodes)


def _layer_plan(layer: Any, records: Sequence[LayerRecord]) -> LayerPlan:
    """Costs of one layer, which may be called several times with the same weights."""
    nodes = layer.mesh.nodes
    if isinstance(layer, DotProductAttention):
        alone = sum(layer.macs(r.positions, layer.features) for r in records)
        return LayerPlan(records[0].path, "", sum(r.macs for r in records), alone, 0, 0)
    window = layer.kernel.shape[-2 - len(getattr(layer, "kernel_size", ())) : -2]
    groups = getattr(layer, "feature_group_count", 1)
    dense = math.prod(window) * (layer.in_features // groups) * layer.out_features
    bias = 0 if layer.bias is None else layer.bias.size
    if layer.exchange.split_axis == -1:  # else every node holds all of it
        bias //= nodes
    dense_bias = 0 if layer.bias is None else layer.out_features
    itemsize = layer.kernel[...].dtype.itemsize
    return LayerPlan(
        records[0].path,
        records[0].exchange,
        macs=sum(r.macs for r in records),
        single_node_macs=sum(r.positions for r in records) * dense,
        weight_bytes=(layer.kernel.size // nodes + bias) * itemsize,
        single_node_weight_bytes=(dense + dense_bias) * itemsize,
    )


def _exchange_plan(module: Any, records: Sequence[ExchangeRecord]) -> ExchangePlan:
    return ExchangePlan(
        path=records[0].path,
        consumers=records[0].consumers,
        positions=tuple(r.positions for r in records),
        features=getattr(module, "features", records[0].shape[-1]),
        wire_dtype=records[0].dtype,
        hops=getattr(module, "hops", ()),
        gathered=module.width if isinstance(module, AllGather) else 0,
    )
