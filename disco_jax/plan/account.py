"""What a packed model moves, computes and holds, exchange by exchange and layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import nnx

from disco_jax.bands import Bands
from disco_jax.gather import AllGather
from disco_jax.layers.attention import DotProductAttention
from disco_jax.layers.weights import dense_kernel
from disco_jax.plan.frozen import mesh_of
from disco_jax.plan.spec import CommunicationPlan, ExchangePlan, LayerPlan
from disco_jax.plan.split import CHANNELS
from disco_jax.repartition import RowsToChannels
from disco_jax.rows import ChannelsToRows, ReplicatedRows, RowReader
from disco_jax.trace import ExchangeRecord, LayerRecord, Trace, modules


def account(
    model: nnx.Module, packed: Trace, peak_activation_bytes: int, message_bytes: int | None
) -> CommunicationPlan:
    """The plan of a packed model, given its trace."""
    found: dict[str, Any] = dict(modules(model))
    calls: dict[str, list[ExchangeRecord]] = {}
    for record in packed.exchanges:
        calls.setdefault(record.path, []).append(record)
    layers: dict[str, list[LayerRecord]] = {}
    for layer in packed.layers:
        layers.setdefault(layer.path, []).append(layer)
    return CommunicationPlan(
        mesh_of(model).nodes,
        tuple(_exchange_plan(found[path], records) for path, records in calls.items()),
        tuple(_layer_plan(found[path], records) for path, records in layers.items()),
        peak_activation_bytes,
        message_bytes,
    )


def _layer_plan(layer: Any, records: Sequence[LayerRecord]) -> LayerPlan:
    """Costs of one layer, which may be called several times with the same weights."""
    if isinstance(layer, DotProductAttention):
        alone = sum(layer.macs(r.positions, layer.features) for r in records)
        return LayerPlan(records[0].path, "", sum(r.macs for r in records), alone, 0, 0)
    dense = dense_kernel(layer)
    kernel, bias = layer.kernel.size, 0 if layer.bias is None else layer.bias.size
    if layer.exchange.split_axis is not None:  # else every node holds all of it
        kernel //= layer.mesh.nodes
    if layer.exchange.split_axis == -1:
        bias //= layer.mesh.nodes
    dense_bias = 0 if layer.bias is None else layer.out_features
    itemsize = layer.kernel[...].dtype.itemsize
    positions = sum(r.positions for r in records)
    if isinstance(layer.exchange, RowReader):  # of which some may be of dead rows
        height = layer.exchange.bands.height
        out = Bands.equal(layer.rows(height).outputs(height), layer.mesh.nodes)
        positions = positions // (out.size * out.nodes) * out.height
    return LayerPlan(
        records[0].path,
        records[0].exchange,
        macs=sum(r.macs for r in records),
        single_node_macs=positions * dense,
        weight_bytes=(kernel + bias) * itemsize,
        single_node_weight_bytes=(dense + dense_bias) * itemsize,
    )


def _exchange_plan(module: Any, records: Sequence[ExchangeRecord]) -> ExchangePlan:
    return ExchangePlan(
        path=records[0].path,
        consumers=records[0].consumers,
        positions=tuple(module.unit_size(r.shape, r.positions) for r in records),
        features=getattr(module, "features", records[0].shape[-1]),
        wire_dtype=records[0].dtype,
        hops=getattr(module, "hops", ()),
        gathered=module.gathered(records[0].shape) if isinstance(module, AllGather) else 0,
        split=module.split if isinstance(module, RowReader | RowsToChannels) else CHANNELS,
        dense_numbers=_dense_numbers(module, records),
    )


def _dense_numbers(module: Any, records: Sequence[ExchangeRecord]) -> int:
    """What the dense split by channels would move: for the images, and a pool's rows, nothing."""
    pools = isinstance(module, RowReader) and not records[0].consumers
    if pools or isinstance(module, ReplicatedRows) or getattr(module, "for_rows", False):
        return 0
    alive = sum(r.positions for r in records)
    rows = getattr(module, "bands", None)
    if rows is not None and not isinstance(module, ChannelsToRows):  # a whole map has no dead rows
        alive = sum(r.positions // r.shape[1] * rows.height for r in records)
    gathered = module.width * module.mesh.nodes if isinstance(module, AllGather) else 0
    return alive * (gathered or module.features) * (module.mesh.nodes - 1)
