"""What of a model is split alike, and who reads whom: the choices that a planner has."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from disco_jax.errors import DiscoError
from disco_jax.exchange import Exchange, Reader
from disco_jax.gather import Gather, Sum
from disco_jax.plan.flow import SPATIAL, Flow, Map
from disco_jax.plan.split import CHANNELS, ROWS
from disco_jax.trace import modules


@dataclasses.dataclass(frozen=True)
class Reading:
    """A module that is given a map: a reader with the layers behind it, or a pool.

    Attributes:
      path: of the module.
      module: itself.
      shape: of the map, batch first.
      held: whether every node holds all of the map, where it is not split by channels.
      source: unit of the map.
      target: unit of what the layers compute; that of the map where there are none.
      layers: their paths.
    """

    path: str
    module: Any
    shape: tuple[int, ...]
    held: bool
    source: int
    target: int
    layers: tuple[str, ...]

    @property
    def repeats(self) -> bool:
        """Whether, where it is not split by channels, every node computes the whole vector."""
        return self.held and (len(self.shape) < 4 or self.shape[1] == 1)


@dataclasses.dataclass(frozen=True)
class Units:
    """Maps that can only be split alike are one unit.

    Attributes:
      splits: what each unit may be split along; by rows, its vectors are held by every node.
      of: the unit of each map, by its ``id``.
      readings: in the order in which they are computed.
    """

    splits: tuple[tuple[str, ...], ...]
    of: dict[int, int]
    readings: tuple[Reading, ...]


def units(model: nnx.Module, flowing: Flow) -> Units:
    """The units of a masked model: its residual streams, and what lies between."""
    found: dict[str, Any] = dict(modules(model))
    maps = _Joined(flowing, found)
    roots = list(dict.fromkeys(maps.root(m) for m in flowing.maps))
    number = {root: i for i, root in enumerate(roots)}
    of = {id(m): number[maps.root(m)] for m in flowing.maps}
    by_channels = {of[id(m)] for m in maps.by_channels}
    whole = {of[id(m)] for m in flowing.maps if id(m) in maps.replicated}
    with_rows = {of[id(m)] for m in flowing.maps if m.has_rows}
    splits = tuple(
        (ROWS,)
        if u in whole
        else (CHANNELS, ROWS)
        if u in with_rows and u not in by_channels
        else (CHANNELS,)
        for u in range(len(roots))
    )
    readings = []
    for path, (map_, shape) in flowing.read.items():
        source, layers = of[id(map_)], maps.layers.get(path, ())
        target = of[id(flowing.made[layers[0]])] if layers else source
        held = id(map_) in maps.replicated or not map_.has_rows
        readings.append(Reading(path, found[path], shape, held, source, target, layers))
    return Units(splits, of, tuple(readings))


class _Joined:
    """Union-find over maps.

    Attributes:
      layers: behind each reader.
      replicated: ids of maps that every node holds, however the others are split.
      by_channels: maps that have to be split by channels.
    """

    def __init__(self, flowing: Flow, found: dict[str, Any]):
        self.flowing, self.found = flowing, found
        self.same = {id(m): id(m) for m in flowing.maps}
        self.by_channels: list[Map] = []
        self.replicated: set[int] = set()
        paths = {id(module): path for path, module in found.items()}
        layers: dict[str, tuple[str, ...]] = {}
        for path in flowing.made:
            if hasattr(found[path], "kernel"):
                reader = paths[id(found[path].exchange)]
                layers[reader] = (*layers.get(reader, ()), path)
        self.layers = layers
        for map_ in flowing.maps:
            if self._everywhere(map_):
                self.replicated.add(id(map_))
            else:
                self._join_parents(map_)
        for path, (map_, shape) in flowing.read.items():
            self._join_readers(path, map_, shape)

    def root(self, map_: Map) -> int:
        number = id(map_)
        while self.same[number] != number:
            number = self.same[number]
        return number

    def join(self, a: Map, b: Map) -> None:
        self.same[self.root(b)] = self.root(a)

    def _everywhere(self, map_: Map) -> bool:
        if not map_.makers:
            return id(map_.parents[0]) in self.replicated
        modules = (self.found[maker] for maker in map_.makers if maker)
        return "" in map_.makers or any(isinstance(m, Gather | Sum) for m in modules)

    def _join_parents(self, map_: Map) -> None:
        """A map and what is spread over it, or mixed to make it."""
        for parent in map_.parents:
            if id(parent) in self.replicated:
                continue
            if map_.mixed or (map_.makers and parent.has_rows):
                self.by_channels += [map_, parent]
            if not map_.makers or not map_.mixed:
                self._join_above(map_, parent)

    def _join_above(self, map_: Map, parent: Map) -> None:
        """The weights of a squeeze-and-excitation, and the layers that compute them."""
        if self.root(map_) == self.root(parent):
            return
        self.join(map_, parent)
        if parent.has_rows:
            return
        for maker in parent.makers:
            if hasattr(self.found[maker], "kernel"):
                reader = next(r for r, layers in self.layers.items() if maker in layers)
                self._join_above(map_, self.flowing.read[reader][0])

    def _join_readers(self, path: str, map_: Map, shape: tuple[int, ...]) -> None:
        """Modules that have no choice but that of their input, and layers of one exchange."""
        module, made = self.found[path], self.flowing.made
        if isinstance(module, SPATIAL):
            self.join(map_, made[path])
        layers = self.layers.get(path, ())
        for layer in layers[1:]:
            self.join(made[layers[0]], made[layer])
        free = id(map_) in self.replicated or isinstance(module, Exchange)
        if layers and isinstance(module, Reader) and not free:
            self.join(map_, made[layers[0]])
        if any(not _has_windows(self.found[layer], shape) for layer in layers):
            self.by_channels.append(made[layers[0]])


def _has_windows(layer: Any, shape: tuple[int, ...]) -> bool:
    """Whether it reads rows as a window does, where it reads any."""
    if len(shape) < 4:
        return True
    try:
        layer.rows(shape[1])
    except (AttributeError, DiscoError):
        return False
    return True
