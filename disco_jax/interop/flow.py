"""A foreign model's computation as steps: our layers, what every node does alone, and gathers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Int

from disco_jax.interop.layout import Layout
from disco_jax.interop.local import Local

Order = Int[np.ndarray, "n p"]


@dataclasses.dataclass(frozen=True)
class Value:
    """What a step has computed, in which slot of memory, and how it lies on the nodes."""

    slot: int
    shape: tuple[int, ...]
    dtype: Any
    layout: Layout | None = None


@dataclasses.dataclass(frozen=True)
class Plain:
    """An operation on arrays of which every node holds all."""

    run: Callable[..., Sequence[Array]]


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Every node gets the whole of an array: an exchange without a mask."""

    name: str
    layout: Layout
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Call:
    """A layer of ours."""

    path: str
    keywords: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """An operation with the slots that it reads and writes."""

    op: Local | Plain | Gathered | Call
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]


def run_alone(steps: Iterable[Step], memory: dict[int, Any]) -> None:
    """Runs steps that need no other node, in ``memory``."""
    for step in steps:
        assert isinstance(step.op, Local | Plain)
        results = step.op.run(*(memory[v.slot] for v in step.ins))
        memory |= {v.slot: x for v, x in zip(step.outs, results, strict=True)}


class Kind(Protocol):
    """What must be known of a layer that is to be split.

    Attributes:
      reads: number of trailing axes of the input that it mixes.
      dims: trailing axes of the output that it makes of them; () if they are as in the input.
    """

    @property
    def reads(self) -> int: ...

    @property
    def dims(self) -> tuple[int, ...]: ...

    def fits(self, layout: Layout | None, ndim: int) -> bool:
        """Whether ours can take an input of ``ndim`` axes that lies so."""
        ...

    def follows(self, layout: Layout) -> Order | None:
        """The order of the outputs where the input decides it; None where any will do."""
        ...


@dataclasses.dataclass
class Flow:
    """The steps of one call, and what was found out on the way.

    Attributes:
      steps: in order.
      arguments, results: where they lie.
      constants, tables: what the steps read beside them; tables have ``n*p`` entries, ``p`` of
        which are each node's.
      inputs: how each layer reads its input; None: every node holds all of it.
      outputs: in which order each layer computes its channels.
      exchanged: for each layer the value it reads first; layers of one value share an exchange.
      unfit: layers that are called in a way that ours cannot be, each with the reason.
      wishes: other orders of layers' channels that operations could work with.
      cost: numbers that gathers move.
    """

    steps: list[Step] = dataclasses.field(default_factory=list)
    arguments: list[Value] = dataclasses.field(default_factory=list)
    results: list[Value] = dataclasses.field(default_factory=list)
    constants: list[tuple[int, Any]] = dataclasses.field(default_factory=list)
    tables: list[tuple[int, Int[np.ndarray, "np"]]] = dataclasses.field(default_factory=list)
    inputs: dict[str, Layout | None] = dataclasses.field(default_factory=dict)
    outputs: dict[str, Order] = dataclasses.field(default_factory=dict)
    exchanged: dict[str, int] = dataclasses.field(default_factory=dict)
    unfit: dict[str, str] = dataclasses.field(default_factory=dict)
    wishes: list[tuple[str, Order]] = dataclasses.field(default_factory=list)
    cost: int = 0
