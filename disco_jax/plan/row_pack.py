"""Bands of rows for the layers that are split by them: what ``freeze`` puts in their places."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from disco_jax import layers
from disco_jax.bands import Bands, Interpolation, Reads
from disco_jax.exchange import Exact, Exchange, Local, Reader
from disco_jax.plan.flow import Flow, flow
from disco_jax.plan.split import ASKED, CHANNELS, REPLICATED, ROWS, bands, resolve
from disco_jax.rows import ChannelsToRows, HaloExchange, Repeated, ReplicatedRows, RowReader
from disco_jax.trace import Images, modules, replace

KINDS: dict[str, type[RowReader]] = {
    REPLICATED: ReplicatedRows,
    ROWS: HaloExchange,
    CHANNELS: ChannelsToRows,
}


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """What the maps of a model are split along.

    Attributes:
      flowing: the maps, and who reads them.
      splits: what each map, by its ``id``, is split along.
      bands: the rows of those split by rows.
      wire_dtype: what rows travel in; None: as computed.
    """

    flowing: Flow
    splits: Mapping[int, str]
    bands: Mapping[int, Bands]
    wire_dtype: str | None

    @classmethod
    def of(cls, model: nnx.Module, images: Images) -> RowPlan | None:
        """Of a masked model; None where nothing is split by rows."""
        asked = getattr(model, ASKED, None)
        if asked is None:
            return None
        readers = {path: getattr(module, "exchange", None) for path, module in modules(model)}
        targets = {path: r.target for path, r in readers.items() if isinstance(r, Exact)}
        flowing = flow(model, images)
        splits = resolve(model, flowing, targets)
        dtype = json.loads(asked)["wire_dtype"]
        return cls(flowing, splits, bands(model, flowing, splits), dtype)

    def source(self, path: str) -> str:
        """What the map that a reader or module is given is split along."""
        return (
            self.splits[id(self.flowing.read[path][0])] if path in self.flowing.read else CHANNELS
        )

    def bands_of(self, path: str) -> Bands:
        """The rows of the map that a reader or module is given."""
        return self.bands[id(self.flowing.read[path][0])]

    def height_of(self, path: str) -> int:
        """Rows of what a module computes; 0 where it computes none."""
        made = self.flowing.made.get(path)
        return next(iter(made.shapes))[1] if made is not None and made.has_rows else 0

    def masked(self, found: Mapping[str, Exchange]) -> dict[str, Bands]:
        """The masked exchanges of maps that are split by rows."""
        return {path: self.bands_of(path) for path in found if self.source(path) == ROWS}


def pack_rows(model: nnx.Module, plan: RowPlan) -> None:
    """Splits the maps of a model by rows, in place; its masked exchanges are packed already."""
    found: dict[str, Any] = dict(modules(model))
    readers: dict[int, nnx.Module] = {}
    for path, (map_, shape) in plan.flowing.read.items():
        module, source = found[path], plan.source(path)
        if isinstance(module, Exact):
            readers[id(module)] = _reader(module, found, plan, path, shape)
        elif isinstance(module, layers.BatchNorm) and source != CHANNELS:
            _replicate(module)
        elif source == ROWS:
            _split(module, plan.bands[id(map_)], shape, plan.height_of(path), plan.wire_dtype)
    for module in found.values():
        if id(getattr(module, "exchange", None)) in readers:
            _replicate(module)
    replace(model, readers)


def _reader(
    exact: Exact,
    found: Mapping[str, Any],
    plan: RowPlan,
    path: str,
    shape: tuple[int, ...],
) -> Reader:
    if exact.target == REPLICATED:
        return Repeated(exact)
    nodes = exact.mesh.nodes
    source = plan.source(path)
    rows = plan.bands_of(path) if source == ROWS else Bands.equal(shape[1], nodes)
    reading = (m for m in found.values() if hasattr(m, "kernel") and m.exchange is exact)
    reads = Reads.union(layer.rows(rows.height).reads(rows.height, nodes) for layer in reading)
    return KINDS[source](exact, rows, reads, wire_dtype=plan.wire_dtype)


def _split(
    module: Any, rows: Bands, shape: tuple[int, ...], height: int, dtype: str | None
) -> None:
    """Tells a module without weights, or a result, that its map is split by rows.

    ``height`` is that of what it computes.
    """
    if isinstance(module, layers.MaxPool | layers.Resize):
        like = Local(shape[-1], mesh=module.mesh, pad=True)
        enlarged = Interpolation(height)
        window = module.rows(rows.height) if isinstance(module, layers.MaxPool) else enlarged
        reads, fill = window.reads(rows.height, rows.nodes), getattr(module, "fill", 0.0)
        module.exchange = HaloExchange(like, rows, reads, fill=fill, wire_dtype=dtype)
        if isinstance(module, layers.Resize):
            module.height = height
    elif isinstance(module, layers.GlobalPool):
        module.split_by_rows(rows, shape[-1])
    elif isinstance(module, layers.PixelShuffle | layers.Concat):
        module.by_rows = True
    elif not isinstance(module, Reader):  # a masked exchange knows it already
        module.bands = rows


def _replicate(module: Any) -> None:
    """All nodes hold all of a module's numbers."""
    for variable in vars(module).values():
        value = variable.get_value() if isinstance(variable, nnx.Variable) else None
        if isinstance(value, jax.Array):
            variable.set_value(module.mesh.put(np.asarray(value)))
