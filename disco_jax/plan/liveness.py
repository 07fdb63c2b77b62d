"""Peak memory of activations, from a walk over a program's equations on shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.extend import core

# What reads buffers and writes one; all else is computed where it is read, as XLA fuses it.
MADE = (
    "conv_",
    "dot_",
    "reduce_",
    "cum",
    "arg",
    "gather",
    "scatter",
    "sort",
    "top_k",
    "fft",
    "while",
    "scan",
    "cond",
    "all_",
    "ppermute",
)
VIEWS = ("reshape", "squeeze", "expand_dims", "split", "pvary", "pcast")


@dataclasses.dataclass(eq=False)
class _Buffer:
    """Bytes that are held from one step to another, both included."""

    size: int
    first: int
    last: int


@dataclasses.dataclass(eq=False)
class _Value:
    """What an equation computes: from the buffers ``sources``, in one of its own if need be."""

    size: int
    sources: Sequence[_Buffer]
    buffer: _Buffer | None = None


def peak_bytes(program: core.ClosedJaxpr, nodes: int = 1) -> int:
    """Most bytes that one of the nodes holds at one time, besides the program's arguments.

    Outside of a ``shard_map`` every array is shared out among the nodes.

    The equations run in their order. Convolutions, products, reductions, concatenations and the
    like read buffers and write one. What lies between is fused, as XLA:CPU does it: computed again
    wherever it is read, from the buffers before it; only a convolution and its like need it in a
    buffer, in place of a source of the same size that nothing reads later. Loops count with their
    results.

    >>> import jax
    >>> def tanh_of_product(x, w):  # in the place of the product
    ...     return jax.numpy.tanh(x @ w)
    >>> x, w = np.ones((2, 8), np.float32), np.ones((8, 16), np.float32)
    >>> peak_bytes(jax.make_jaxpr(tanh_of_product)(x, w))
    128
    """
    walk = _Walk(nodes)
    walk.fill(walk.run(program.jaxpr, [None] * len(program.jaxpr.invars)))
    steps = np.zeros(walk.step + 2, np.int64)
    for buffer in walk.held():
        steps[buffer.first] += buffer.size
        steps[buffer.last + 1] -= buffer.size
    return int(steps.cumsum().max())


class _Walk:
    """The equations done so far, one or two steps each."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes  # among which the arrays of the equations at hand are shared
        self.step = 0
        self.buffers: list[_Buffer] = []
        self.places: list[tuple[_Buffer, Sequence[_Buffer]]] = []  # where a buffer may take over

    def run(self, jaxpr: core.Jaxpr, inputs: Iterable[_Value | None]) -> list[_Value | None]:
        """Does the equations, those of called programs too; arguments and constants are None."""
        values: dict[Any, _Value | None] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atoms: Iterable[Any]) -> list[_Value | None]:
            return [None if isinstance(a, core.Literal) else values.get(a) for a in atoms]

        for eqn in jaxpr.eqns:
            values.update(zip(eqn.outvars, self.do(eqn, read(eqn.invars)), strict=True))
        return read(jaxpr.outvars)

    def do(self, eqn: core.JaxprEqn, operands: list[_Value | None]) -> list[_Value | None]:
        name, sizes = eqn.primitive.name, [_size(v.aval) // self.nodes for v in eqn.outvars]
        called = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if name.startswith(MADE):
            return self.make(sizes, operands)
        if called is not None:
            shared, self.nodes = self.nodes, 1 if name == "shard_map" else self.nodes
            results = self.run(getattr(called, "jaxpr", called), operands)
            self.nodes = shared
            return results
        given = [value for value in operands if value is not None]
        if name in VIEWS and sizes == [value.size for value in given]:
            return [*given]
        sources = list(dict.fromkeys(source for value in given for source in value.sources))
        results = [_Value(size, sources) if sources else None for size in sizes]
        if name == "concatenate":  # fused with what it reads, but not with what reads it
            return _solid(self.fill(results)) if sources else results
        return results

    def make(self, sizes: Iterable[int], operands: list[_Value | None]) -> list[_Value | None]:
        read = self.fill(operands)
        self.step += 1
        for buffer in read:
            buffer.last = self.step
        return _solid([self.hold(size) for size in sizes])

    def fill(self, values: Iterable[_Value | None]) -> list[_Buffer]:
        """The buffers of values, computed from their sources where they have none yet."""
        filled = []
        for value in values:
            if value is None:
                continue
            if value.buffer is None:
                self.step += 1
                for source in value.sources:
                    source.last = self.step
                value.buffer = self.hold(value.size)
                self.places.append((value.buffer, value.sources))
            filled.append(value.buffer)
        return filled

    def hold(self, size: int) -> _Buffer:
        self.buffers.append(_Buffer(size, self.step, self.step))
        return self.buffers[-1]

    def held(self) -> list[_Buffer]:
        """All buffers, those ended that another took over from."""
        for buffer, sources in self.places:
            for source in sources:
                if (source.size, source.last) == (buffer.size, buffer.first):
                    source.last -= 1
                    break
        return self.buffers


def _solid(buffers: list[_Buffer]) -> list[_Value | None]:
    return [_Value(buffer.size, [buffer], buffer) for buffer in buffers]


def _size(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize
