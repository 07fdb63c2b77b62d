"""What every layer of a model is split along: channels, rows, or nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from disco_jax.bands import Bands
from disco_jax.errors import DiscoError, require
from disco_jax.exchange import Exact, Exchange, Reader, Replicated
from disco_jax.gather import Gather, Sum, floating
from disco_jax.layers import GlobalPool, PixelShuffle
from disco_jax.plan.flow import Flow, Map, flow
from disco_jax.plan.frozen import mesh_of
from disco_jax.trace import Images, modules, replace

CHANNELS, ROWS, REPLICATED = "channels", "rows", "replicated"
ASKED = "split_by_rows"  # the attribute of a model that says what it was split by


def split(
    model: nnx.Module, images: Images, rows: Sequence[str], *, wire_dtype: str | None = None
) -> None:
    """Splits layers by rows, in place; all others stay split by channels.

    A layer that is split by rows computes what it would on one node: there is no mask, every node
    holds all of its weights, and it reads a few rows of its neighbours. Early layers have large
    maps and few weights. Training goes on as before, ``freeze`` makes bands of rows for images of
    this size.

    Args:
      model: a masked model, in which nothing is split by rows yet.
      images: an example input (or its ``jax.ShapeDtypeStruct``); only the shape is used.
      rows: patterns (``re.search``) of the paths of layers; those that compute vectors, or one
        number of every channel, have no rows and are split as they have to be. None, no split.
      wire_dtype: what rows travel in, between layers split by rows and to them: ``"float16"``,
        ``"bfloat16"`` or ``"float32"``; None sends what is computed. What masks thin travels as
        everywhere.

    Raises:
      DiscoError: if a pattern is found in no path, or what the nodes add to each other would not be
        split alike.

    >>> import disco_jax as dj, jax
    >>> mesh = dj.NodeMesh(2, emulate=True)
    >>> model = dj.models.create("resnet8", mesh=mesh, rngs=nnx.Rngs(0))
    >>> images = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    >>> dj.split(model, images, ["^conv$", "blocks.0"])
    >>> [exchange.path for exchange in dj.trace(model, images).exchanges][:2]
    ['blocks.1.exchange', 'blocks.1.conv2.exchange']
    """
    if not rows:
        return
    require(
        not getattr(model, "by_channels", False),
        f"`model` (={type(model).__name__}) comes from dj.distribute, which splits by channels "
        "alone; rows need a model of this library's layers",
    )
    require(
        not hasattr(model, ASKED),
        f"`model` (={type(model).__name__}) is split by rows already; give all patterns at once",
    )
    found: dict[str, Any] = dict(modules(model))
    flowing = flow(model, images)
    layers = [p for p in flowing.made if hasattr(found[p], "kernel")]
    chosen = _chosen([p for p in layers if flowing.made[p].has_rows], rows)
    splits = resolve(model, flowing, dict.fromkeys(chosen, ROWS))
    if mesh_of(model).nodes == 1:
        return  # which has all rows, and all channels
    bands(model, flowing, splits)  # what cannot be is said before anything is trained
    replacements: dict[int, nnx.Module] = {}
    for path, reader in found.items():
        if not isinstance(reader, Reader) or path not in flowing.read:
            continue
        source = splits[id(flowing.read[path][0])]
        behind = [p for p in layers if found[p].exchange is reader]
        target = _target(behind, flowing, splits)
        require(
            isinstance(reader, Exchange) or source != ROWS or target != CHANNELS,
            f"`{behind[0]}` reads a node's own channels alone, which nobody has of what "
            f"{_names(flowing.read[path][0])} computes by rows; split both alike",
        )
        if target in (ROWS, REPLICATED):
            replacements[id(reader)] = Exact(reader, target)
        elif source == REPLICATED and isinstance(reader, Exchange):
            replacements[id(reader)] = _replicated(reader)
        elif source == ROWS and isinstance(reader, Exchange):
            reader.from_rows = True
    for path in layers:
        layer = found[path]
        if id(layer.exchange) in replacements and layer.kernel.has_metadata("exchange"):
            layer.kernel.del_metadata("exchange")  # no mask any more
    replace(model, replacements)
    asked = {"shape": images.shape, "dtype": str(images.dtype), "layers": chosen}
    asked["wire_dtype"] = floating(wire_dtype)
    setattr(model, ASKED, json.dumps(asked))  # for freeze, and a plan that is loaded


def split_again(model: nnx.Module, asked: str) -> jax.ShapeDtypeStruct:
    """Splits a model as another one was, whose ``split_by_rows`` is given; returns its images."""
    known = json.loads(asked)
    images = jax.ShapeDtypeStruct(tuple(known["shape"]), known["dtype"])
    rows = [f"^{re.escape(path)}$" for path in known["layers"]]
    split(model, images, rows, wire_dtype=known["wire_dtype"])
    return images


def resolve(model: nnx.Module, flowing: Flow, layers: Mapping[str, str]) -> dict[int, str]:
    """What each map is split along, by its ``id``, given the layers that are not split by channels.

    Raises:
      DiscoError: if a map cannot be split so.
    """
    found: dict[str, Any] = dict(modules(model))
    splits: dict[int, str] = {}
    for map_ in flowing.maps:
        splits[id(map_)] = _split_of(map_, flowing, found, layers, splits)
    for map_ in flowing.maps:  # now that all sources are known
        _split_of(map_, flowing, found, layers, splits)
    for map_, parent in ((m, p) for m in flowing.maps for p in m.parents):
        require(
            not map_.mixed or splits[id(parent)] != ROWS,
            f"what {_names(parent)} computes cannot be split by rows: {map_.mixed!r} reads it; "
            "split it by channels",
        )
        if splits[id(map_)] == ROWS:
            _everywhere(parent, flowing, found, splits, needed_by=map_)
    return splits


def bands(model: nnx.Module, flowing: Flow, splits: Mapping[int, str]) -> dict[int, Bands]:
    """Who owns which rows of every map that is split by them."""
    found: dict[str, Any] = dict(modules(model))
    result: dict[int, Bands] = {}
    for map_ in flowing.maps:
        if splits[id(map_)] != ROWS:
            continue
        options, heights = set(), {shape[1] for shape in map_.shapes}
        require(
            len(heights) == 1,
            f"what {_names(map_)} computes has maps of {sorted(heights)} rows, which have no "
            "bands in common; split it by channels",
        )
        (height,) = heights
        for maker in map_.makers:
            module = found[maker]
            own = Bands.equal(height, module.mesh.nodes)
            if isinstance(module, PixelShuffle):
                source = id(flowing.read[maker][0])
                require(
                    source in result,
                    f"`{maker}` is beside what it is computed from, which rows cannot be; split "
                    "them by channels",
                )
                before = result[source]
                own = Bands(height, before.nodes, before.size * module.scale)
            options.add(own)
        require(
            len(options) == 1,
            f"what {_names(map_)} computes is split into bands of different sizes: {options}; "
            "split some of it by channels",
        )
        result[id(map_)] = options.pop()
    return result


def _chosen(layers: Sequence[str], patterns: Sequence[str]) -> list[str]:
    for pattern in patterns:
        require(
            any(re.search(pattern, path) for path in layers),
            f"`rows` entry {pattern!r} is found in no path of a layer; the first are "
            f"{', '.join(layers[:5])}",
        )
    return [path for path in layers if any(re.search(p, path) for p in patterns)]


def _split_of(
    map_: Map,
    flowing: Flow,
    found: Mapping[str, Any],
    layers: Mapping[str, str],
    splits: Mapping[int, str],
) -> str:
    """Of a map, from those of its sources that are known: what is concatenated may go round."""
    if not map_.makers:
        return splits[id(map_.parents[0])]
    options: dict[str, str] = {}
    for maker in map_.makers:
        module = found[maker]
        if maker == "":
            options[maker] = REPLICATED
        elif hasattr(module, "kernel"):
            options[maker] = layers.get(maker, CHANNELS)
        elif isinstance(module, Gather | Sum):
            options[maker] = REPLICATED
        elif id(flowing.read[maker][0]) in splits:
            source = splits[id(flowing.read[maker][0])]
            pooled = isinstance(module, GlobalPool) and source == ROWS
            options[maker] = REPLICATED if pooled else source
    if len(set(options.values())) > 1:
        by_rows = [m for m, s in options.items() if s == ROWS]
        others = [m for m, s in options.items() if s != ROWS]
        raise DiscoError(
            f"`{others[0]}` must be split by rows as `{(by_rows or others)[0]}` is, for what they "
            "compute is added up; give patterns that fit both, or neither"
        )
    return options.popitem()[1]


def _everywhere(
    map_: Map,
    flowing: Flow,
    found: Mapping[str, Any],
    splits: dict[int, str],
    *,
    needed_by: Map,
) -> None:
    """Makes a map, such as the weights of a squeeze-and-excitation, known to every node."""
    if splits[id(map_)] == REPLICATED:
        return
    require(
        splits[id(map_)] == CHANNELS and all(hasattr(found[m], "kernel") for m in map_.makers),
        f"what {_names(map_)} computes is split by {splits[id(map_)]}, and {_names(needed_by)} by "
        "rows needs all of it; split them alike",
    )
    splits[id(map_)] = REPLICATED
    for parent in map_.parents:
        _everywhere(parent, flowing, found, splits, needed_by=needed_by)
    for maker in map_.makers:
        reader = next(p for p, m in found.items() if m is found[maker].exchange)
        _everywhere(flowing.read[reader][0], flowing, found, splits, needed_by=needed_by)


def _target(layers: Collection[str], flowing: Flow, splits: Mapping[int, str]) -> str:
    """What the layers that read one map through one reader are split along."""
    targets = {path: splits[id(flowing.made[path])] for path in layers}
    if len(set(targets.values())) > 1:
        raise DiscoError(
            f"layers that share an exchange must be split alike, but {targets}; give patterns that "
            "fit all of them, or none"
        )
    return next(iter(targets.values()), CHANNELS)


def _replicated(reader: Reader) -> Replicated:
    """Reads what every node holds, dead channels included."""
    found = Replicated(reader.features, mesh=reader.mesh)
    found.channels, found.name = reader.channels, reader.name
    return found


def _names(map_: Map) -> str:
    return " and ".join(f"`{maker}`" for maker in map_.makers[:2]) or "an operation between layers"
