"""Every exchange and layer of a model with its shapes, from one abstract pass."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from disco_jax.errors import require
from disco_jax.exchange import Exchange, Reader
from disco_jax.gather import AllGather
from disco_jax.layers.attention import DotProductAttention
from disco_jax.layers.weights import note_exchange
from disco_jax.packed import PackedExchange
from disco_jax.readable import recording
from disco_jax.repartition import RowsToChannels
from disco_jax.rows import RowReader

Images = jax.Array | np.ndarray | jax.ShapeDtypeStruct


def modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Every module once, breadth first, so that a shared one has its shortest path."""
    queue: deque[tuple[str, Any]] = deque([("", model)])
    seen: set[int] = set()
    while queue:
        path, module = queue.popleft()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        for name, child in nnx.iter_children(module):
            if not isinstance(child, nnx.Variable):
                queue.append((f"{path}.{name}" if path else str(name), child))


def replace(model: nnx.Module, replacements: Mapping[int, nnx.Module]) -> None:
    """Puts other modules in the places of some, which are named by their ``id``; in place."""
    for _, module in list(modules(model)):
        for name, child in list(vars(module).items()):
            if id(child) in replacements:
                setattr(module, name, replacements[id(child)])


def exchanges(model: nnx.Module) -> dict[str, Exchange]:
    """The masked exchanges of a model by path."""
    return {path: m for path, m in modules(model) if isinstance(m, Exchange)}


def readers(model: nnx.Module) -> dict[str, list[tuple[str, Any]]]:
    """For each path of a masked or packed exchange the layers ``(path, layer)`` that read it."""
    found = list(modules(model))
    moving = (Exchange, PackedExchange, RowReader, RowsToChannels)
    paths = {id(m): path for path, m in found if isinstance(m, moving)}
    layers: dict[str, list[tuple[str, Any]]] = {path: [] for path in paths.values()}
    for path, layer in found:
        reader = getattr(layer, "exchange", None)
        if id(reader) in paths and hasattr(layer, "kernel"):
            layers[paths[id(reader)]].append((path, layer))
    return layers


def name_exchanges(model: nnx.Module) -> None:
    """Tells every exchange its path, and every kernel the path of the exchange it reads.

    An optimiser sees parameters only: the name on the kernel (metadata ``exchange``) is how
    ``sparsify.sparse_exchange`` knows which kernels share a mask.
    """
    for path, module in modules(model):
        if isinstance(module, Reader | AllGather):
            module.name = path
    for path, layers in readers(model).items():
        for _, layer in layers:
            note_exchange(layer, path)


@dataclasses.dataclass(frozen=True)
class ExchangeRecord:
    """One call of an exchange.

    ``shape`` is what it was given, channels last, and ``dtype`` what that travels in; ``positions``
    are pixels or tokens per example.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    consumers: tuple[str, ...]
    positions: int


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """One call of a layer with weights, or of an attention, which has none and reads no exchange.

    ``positions`` are pixels or tokens of the output, ``macs`` the multiplications of one node; both
    per example.
    """

    path: str
    exchange: str
    positions: int
    macs: int


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one call of a model moves and computes, in order."""

    exchanges: tuple[ExchangeRecord, ...]
    layers: tuple[LayerRecord, ...]


def trace(model: nnx.Module, images: Images) -> Trace:
    """Runs the model on shapes alone; nothing is computed and the model is not changed.

    Args:
      model: any model made of this library's layers, masked or packed.
      images: the input, or its ``jax.ShapeDtypeStruct``.
    """
    graphdef, state = nnx.split(model)

    def call(state: Any, images: Any) -> tuple[Any, ...]:
        merged = nnx.merge(graphdef, state)
        merged.eval()
        with recording() as events:
            merged(images)
        records.append(_records(merged, events, images.shape[0]))
        return ()

    records: list[Trace] = []
    jax.eval_shape(call, state, images)
    return records[0]


def _records(model: nnx.Module, events: list[tuple[Any, Any]], batch: int) -> Trace:
    paths = {id(module): path for path, module in modules(model)}
    consumers = {path: tuple(p for p, _ in layers) for path, layers in readers(model).items()}
    moved, computed = [], []
    for module, value in events:
        require(
            id(module) in paths,
            f"`model` calls a copy of its {type(module).__name__}, so that its path is not known; "
            "call it without nnx.jit, nnx.remat and the like inside of the model",
        )
        path = paths[id(module)]
        # Some models fold other axes into that of the batch, windows of tokens say.
        positions = max(1, math.prod(value.shape[:-1]) // batch)
        if hasattr(module, "kernel"):
            sharers = 1 if module.exchange.repeats else module.mesh.nodes
            macs = positions * module.kernel.size // sharers
            computed.append(LayerRecord(path, paths[id(module.exchange)], positions, macs))
        elif isinstance(module, DotProductAttention):
            macs = module.macs(*value.shape[1:]) // module.mesh.nodes
            computed.append(LayerRecord(path, "", positions, macs))
        else:
            reading = consumers.get(path, ())
            dtype = getattr(module, "wire_dtype", None) or str(value.dtype)
            moved.append(ExchangeRecord(path, value.shape, dtype, reading, positions))
    return Trace(tuple(moved), tuple(computed))
