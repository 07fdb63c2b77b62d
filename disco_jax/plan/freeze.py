"""Masks -> plan -> packed model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from disco_jax import wire
from disco_jax.bands import Bands
from disco_jax.errors import require
from disco_jax.exchange import Exchange
from disco_jax.mesh import NODE, NodeMesh
from disco_jax.messages import check_message_bytes, limited
from disco_jax.packed import Hop, PackedExchange, received_channels, split_hops
from disco_jax.plan.account import account
from disco_jax.plan.fold import fold_norms
from disco_jax.plan.frozen import Frozen, mesh_of
from disco_jax.plan.liveness import peak_bytes
from disco_jax.plan.row_pack import RowPlan, pack_rows
from disco_jax.repartition import RowsToChannels
from disco_jax.sparsify.quantise import WireDtype, wire_dtypes, wire_scales
from disco_jax.trace import (
    Images,
    Trace,
    exchanges,
    modules,
    readers,
    replace,
    trace,
)

# For each exchange of a map that is split by rows, its rows, the channels that each node reads, and
# how many of them a message has at most.
FromRows = Mapping[str, tuple[Bands, Int[np.ndarray, "n r"], int | None]]


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
      message_bytes: what a message has at most per example, a multiple of 8; larger ones go in
        pieces, one after another. On several hosts 100_000 is better than none: a node of gloo
        that comes later sends all of its message before it says that it is ready to receive, so
        that two nodes take turns; a link that may send in bursts makes up for small ones.

    Returns:
      The packed model, compiled on its first call.

    Raises:
      DiscoError: if the mesh has another number of nodes, the wire dtype is not one or has no
        images to be calibrated on, ``message_bytes`` is not such a size, or the model has no
        exchange.
    """
    message_bytes = check_message_bytes(message_bytes)
    found, rows = exchanges(model), RowPlan.of(model, images)
    require(
        bool(found) or rows is not None,
        f"`model` (={type(model).__name__}) has no masked exchange; pass a model made of "
        "disco_jax layers that is not frozen already",
    )
    nodes = mesh_of(model).nodes
    require(
        mesh is None or mesh.nodes == nodes,
        f"`nodes` of the mesh (={mesh and mesh.nodes}) must be those of the model (={nodes}); "
        f"pass mesh=NodeMesh(nodes={nodes})",
    )
    traced = trace(model, images)
    dtypes, scales = _wires(model, images, wire_dtype)
    dtypes = {r.path: r.dtype for r in traced.exchanges} | dtypes
    hops = _hops(found, traced, dtypes, message_bytes)
    widths = {r.path: math.prod(r.shape[2:-1]) for r in traced.exchanges}
    packed = nnx.clone(model)
    fold_norms(packed, images)
    if mesh is not None:
        move(packed, mesh)
    from_rows: FromRows = {
        path: (
            bands,
            readable_channels(hops[path], nodes, found[path].channels),
            _most(message_bytes, bands.size * widths[path], dtypes[path]),
        )
        for path, bands in (rows.masked(found) if rows else {}).items()
    }
    _pack(packed, hops, dtypes, scales, from_rows)
    if rows is not None:
        pack_rows(packed, rows)
    packed.eval()
    peak = _peak_activation_bytes(packed, images, message_bytes)
    return Frozen(packed, account(packed, trace(packed, images), peak, message_bytes))


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
    """The messages of every exchange, of ``most`` bytes at most, or of one channel.

    So that a node packs the next one while the link, where it may send in bursts, catches up.
    """
    hops = {path: plan_hops(np.asarray(e.mask[...])) for path, e in found.items()}
    channels = {r.path: _most(most, r.positions, dtypes[r.path]) for r in traced.exchanges}
    return {path: split_hops(planned, channels.get(path)) for path, planned in hops.items()}


def _most(message_bytes: int | None, positions: int, wire_dtype: str) -> int | None:
    """Channels of so many positions that a message has at most."""
    if message_bytes is None:
        return None
    return max(1, message_bytes // wire.nbytes(positions, wire_dtype))


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
    from_rows: FromRows,
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
    replace_exchanges(model, hops, dtypes, scales, from_rows)


def replace_exchanges(
    model: nnx.Module,
    hops: Mapping[str, tuple[Hop, ...]],
    dtypes: Mapping[str, str],
    scales: Mapping[str, Float[np.ndarray, "2 c"]],
    from_rows: FromRows,
) -> None:
    """Puts a packed exchange where a masked one was, in place; kernels stay as they are."""

    def packed(path: str, exchange: Exchange) -> nnx.Module:
        given = (dtypes.get(path, "float32"), scales.get(path))
        if path not in from_rows:
            return PackedExchange(exchange, hops.get(path, ()), *given)
        bands, readable, most = from_rows[path]
        return RowsToChannels(exchange, bands, readable, *given, most)

    replace(model, {id(e): packed(path, e) for path, e in exchanges(model).items()})


def _peak_activation_bytes(model: nnx.Module, images: Images, message_bytes: int | None) -> int:
    """What a node of a packed model holds of one example; all of them hold as much."""
    mesh = mesh_of(model)
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.eval_shape(lambda state: state, state))
    move(model, mesh.abstract())
    graphdef, state = nnx.split(model)
    example = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    with limited(message_bytes, examples=1):
        program = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, example)
    return peak_bytes(program, mesh.nodes)
