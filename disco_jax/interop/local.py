"""An operation that every node does on its own blocks, and what the rules that find one share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import JaxprEqn
from jaxtyping import Array

from disco_jax.interop import programs
from disco_jax.interop.layout import Layout

Layouts = Sequence[Layout | None]


@dataclasses.dataclass(frozen=True)
class Local:
    """An operation of each node on its own blocks.

    Attributes:
      run: the operation; from blocks of the operands to blocks of the results.
      wants: how the operands must lie.
      gives: how the results lie.
      aligned: whether it does the same to every slot, so that it may as well run on the whole
        array at once.
    """

    run: Callable[..., Sequence[Array]]
    wants: tuple[Layout | None, ...]
    gives: tuple[Layout | None, ...]
    aligned: bool = True


Rule = Callable[[JaxprEqn, Layouts], Local | None]


def same(eqn: JaxprEqn, layout: Layout, gives: Layout | None = None) -> Local:
    """The primitive itself, of one split operand first and others that all nodes hold."""
    others = (None,) * (len(eqn.invars) - 1)
    return Local(bound(eqn), (layout, *others), (gives or layout,) * len(eqn.outvars))


def bound(eqn: JaxprEqn, **changes: Any) -> Callable[..., Sequence[Array]]:
    """The equation as a function of its operands."""
    return lambda *blocks: programs.bind(eqn, blocks, **changes)


def shapes(eqn: JaxprEqn) -> list[tuple[int, ...]]:
    """Of the operands, undivided."""
    return [aval.shape for aval in programs.avals(eqn.invars)]


def first(layouts: Layouts) -> Layout | None:
    """The layout of the first operand if no other is split."""
    return layouts[0] if all(layout is None for layout in layouts[1:]) else None


def resized(sizes: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    """The same sizes but for one axis."""
    return (*sizes[:axis], size, *sizes[axis + 1 :])
