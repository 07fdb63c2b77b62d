"""Which arrays of a model must be split alike, and what reads and makes them: read off its jaxpr.

What only elementwise operations lie between, such as all that a residual stream is made of, is one
**map**. Layers, exchanges and the modules that know of rows are where maps begin and end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core
from jaxtyping import Array

from disco_jax.exchange import Reader
from disco_jax.gather import Gather, Sum
from disco_jax.layers import BatchNorm, Concat, GlobalPool, MaxPool, PixelShuffle, Resize
from disco_jax.mesh import NodeMesh
from disco_jax.readable import Readable
from disco_jax.sparsify.channels import ELEMENTWISE, INNER
from disco_jax.trace import Images, modules, replace

READ, MADE = "read:", "made:"
SPATIAL = (Concat, GlobalPool, MaxPool, PixelShuffle, Resize)  # split as what they are given
KNOWN = (*SPATIAL, Gather, Sum)  # modules that can be split by rows


@dataclasses.dataclass
class Map:
    """Arrays that are split alike.

    Attributes:
      shapes: of the arrays, batch first.
      makers: paths of the layers and modules that compute it; ``""`` for the images.
      parents: maps that it is computed from by operations that belong to no module.
      mixed: the first of these operations that mixes rows or columns; "" if there is none.
    """

    shapes: set[tuple[int, ...]] = dataclasses.field(default_factory=set)
    makers: list[str] = dataclasses.field(default_factory=list)
    parents: list[Map] = dataclasses.field(default_factory=list)
    mixed: str = ""

    @property
    def has_rows(self) -> bool:
        """Whether it can be split by rows: ``[b, h, w, c]`` with more than one of them."""
        return all(len(shape) == 4 and shape[1] > 1 for shape in self.shapes)


@dataclasses.dataclass
class Flow:
    """The maps of a model.

    Attributes:
      maps: in the order in which they are computed, the images first.
      read: the map that each reader, or module without one, is given, and its shape.
      made: the map that each layer and module computes.
    """

    maps: list[Map]
    read: dict[str, tuple[Map, tuple[int, ...]]]
    made: dict[str, Map]


def flow(model: nnx.Module, images: Images) -> Flow:
    """The maps of a model, masked and in evaluation mode; nothing is computed."""
    model = _probed(model)
    graphdef, state = nnx.split(model)
    shape = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

    def call(images: Any, state: Any) -> Any:
        return nnx.merge(graphdef, state)(images)

    jaxpr = jax.make_jaxpr(call)(shape, spec).jaxpr
    walk = _Walk()
    first = walk.new(shape.shape, "")
    walk.run(jaxpr, [first, *[None] * (len(jaxpr.invars) - 1)])
    return walk.finish()


def _probed(model: nnx.Module) -> nnx.Module:
    """The same model on one node, every layer, reader and known module a probe."""
    model = nnx.clone(model, variables=False)
    model.eval()
    found: dict[str, Any] = dict(modules(model))
    for module in found.values():
        if hasattr(module, "mesh"):
            module.mesh = NodeMesh(1, emulate=True)
    probes: dict[int, nnx.Module] = {}
    for path, module in found.items():
        if isinstance(module, Reader):
            probes[id(module)] = _ProbeReader(module, path)
        elif isinstance(module, KNOWN):
            probes[id(module)] = _ProbeModule(module, path)
        elif isinstance(module, BatchNorm):
            probes[id(module)] = _ProbeNorm(module, path)
    replace(model, probes)
    layers = [(p, m) for p, m in modules(model) if hasattr(m, "kernel") and hasattr(m, "exchange")]
    replace(model, {id(m): _ProbeLayer(m, p) for p, m in layers})
    return model


def _tagged(name: str, fn: Callable[..., Array], *xs: Array) -> Array:
    """An equation of that name."""
    fn.__name__ = name
    return jax.jit(fn)(*xs)


def _made(path: str, like: Any) -> Array:
    return _tagged(MADE + path, lambda: jnp.zeros(like.shape, like.dtype))


class _ProbeReader(Reader):
    def __init__(self, inner: Reader, path: str):
        super().__init__(inner.features, mesh=inner.mesh, pad=True)
        self.channels, self.split_axis, self.path = inner.channels, inner.split_axis, path

    def __call__(self, x: Array) -> Readable:
        _tagged(READ + self.path, lambda x: x, x)
        return Readable(x, self.mesh, source=id(self))


class _ProbeLayer(nnx.Module):
    def __init__(self, inner: Any, path: str):
        self.inner, self.path, self.mesh = inner, path, inner.mesh
        self.exchange = inner.exchange  # which models read

    def __call__(self, inputs: Array | Readable) -> Array:
        given = inputs if isinstance(inputs, Readable) else self.inner.exchange(inputs)
        return _made(self.path, jax.eval_shape(self.inner, given))


class _ProbeModule(nnx.Module):
    def __init__(self, inner: Any, path: str):
        self.inner, self.path, self.mesh = inner, path, inner.mesh

    def __call__(self, x: Any, *others: Any) -> Any:
        for one in jax.tree.leaves(x):
            _tagged(READ + self.path, lambda x: x, one)
        found = jax.eval_shape(lambda x: self.inner(x, *others), x)
        return jax.tree.map(lambda like: _made(self.path, like), found)


class _ProbeNorm(nnx.Module):
    """Elementwise, in evaluation: its map goes on."""

    def __init__(self, inner: BatchNorm, path: str):
        self.inner, self.path, self.mesh = inner, path, inner.mesh

    def __call__(self, x: Array, **keywords: Any) -> Array:
        _tagged(READ + self.path, lambda x: x, x)
        return self.inner(x, **keywords)


class _Walk:
    """The equations done so far; maps are numbers until :meth:`finish`, some of them the same."""

    def __init__(self) -> None:
        self.same: list[int] = []
        self.maps: list[Map] = []
        self.parents: dict[int, list[int]] = {}
        self.read: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.made: dict[str, int] = {}

    def new(self, shape: tuple[int, ...], maker: str | None = None, mixed: str = "") -> int:
        self.same.append(len(self.same))
        makers = [] if maker is None else [maker]
        self.maps.append(Map({shape}, makers, mixed=mixed))
        return self.same[-1]

    def find(self, number: int) -> int:
        while self.same[number] != number:
            number = self.same[number]
        return number

    def run(self, jaxpr: Any, inputs: list[int | None]) -> list[int | None]:
        """The maps of the outputs, given those of the inputs; None depends on no image."""
        values: dict[Any, int | None] = dict(zip(jaxpr.invars, inputs, strict=True))

        def known(atoms: Any) -> list[int | None]:
            return [None if isinstance(a, core.Literal) else values.get(a) for a in atoms]

        for eqn in jaxpr.eqns:
            values |= dict(zip(eqn.outvars, self.do(eqn, known(eqn.invars)), strict=True))
        return known(jaxpr.outvars)

    def do(self, eqn: Any, given: list[int | None]) -> list[int | None]:
        name, shapes = eqn.params.get("name", ""), [v.aval.shape for v in eqn.outvars]
        if name.startswith(MADE):
            path = name.removeprefix(MADE)
            number = self.new(shapes[0], path)
            if path in self.made:  # one module, one split
                self.unite(number, self.made[path])
            self.made[path] = number
            return [number]
        if all(number is None for number in given):
            return [None] * len(shapes)
        if name.startswith(READ):
            path, source = name.removeprefix(READ), given[0]
            assert source is not None
            if path in self.read:
                self.unite(source, self.read[path][0])
            self.read[path] = source, shapes[0]
            return [source]
        inner = next((eqn.params[k] for k in INNER if k in eqn.params), None)
        if inner is not None and len(getattr(inner, "jaxpr", inner).invars) == len(given):
            return self.run(getattr(inner, "jaxpr", inner), given)
        return self.between(eqn, given, shapes)

    def between(self, eqn: Any, given: list[int | None], shapes: list[Any]) -> list[int | None]:
        """An operation of no module: elementwise it goes on with its map, or a new one begins."""
        some = [n for n in given if n is not None]
        pairs = zip(given, eqn.invars, strict=True)
        whole = [n for n, v in pairs if n is not None and v.aval.shape == shapes[0]]
        if eqn.primitive.name in ELEMENTWISE and whole:
            for number in whole[1:]:
                self.unite(whole[0], number)
            self.parents.setdefault(whole[0], []).extend(n for n in some if n not in whole)
            return [whole[0]] * len(shapes)
        spread = eqn.primitive.name in (*ELEMENTWISE, "broadcast_in_dim")
        found = [self.new(s, mixed="" if spread else eqn.primitive.name) for s in shapes]
        for number in found:
            self.parents[number] = some
        return [*found]

    def unite(self, a: int, b: int) -> None:
        a, b = sorted((self.find(a), self.find(b)))
        if a != b:
            self.same[b] = a
            into, other = self.maps[a], self.maps[b]
            into.shapes |= other.shapes
            into.makers += other.makers
            into.mixed = into.mixed or other.mixed

    def finish(self) -> Flow:
        roots = {i: self.maps[self.find(i)] for i in range(len(self.maps))}
        for number, parents in self.parents.items():
            own = roots[number]
            own.parents += [roots[p] for p in parents if roots[p] is not own]
        maps = list({id(m): m for m in roots.values()}.values())
        read = {path: (roots[n], shape) for path, (n, shape) in self.read.items()}
        return Flow(maps, read, {path: roots[n] for path, n in self.made.items()})
