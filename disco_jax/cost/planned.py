"""What a planner has chosen, and what that takes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one masked exchange sends.

    Attributes:
      density: share of the remote (node, channel) pairs.
      wire_dtype: how they travel.
      ms: what that takes on a link that is busy, the multiplications of its readers included.
      kept: share of the energy of what is read, own channels and rounding included.
    """

    density: float
    wire_dtype: str
    ms: float
    kept: float


@dataclasses.dataclass(frozen=True)
class Point:
    """What a plan takes and gives.

    Attributes:
      ms: latency as ``cost.predict`` counts it.
      memory: weights of a node, as a share of those of a node that works alone.
      kept: mean share of the energy that an exchange's readers read (geometric, over all exchanges;
        1 where rows bring all).
    """

    ms: float
    memory: float
    kept: float


@dataclasses.dataclass(frozen=True)
class Planned(Point):
    """What all layers are split along, and all exchanges send.

    Attributes:
      layers: that are split by rows.
      row_dtype: what rows travel in.
      choices: by path of the masked exchange.
      fixed_ms: results, and what no choice changes.
      alternatives: by name, the fastest if all layers are split one way, whatever the memory, and
        one node that works alone.
      front: the fastest of other limits of memory.

    ``rows`` and ``row_dtype`` go to ``dj.split``; ``rules`` to ``prune`` or ``sparse_exchange``;
    ``wire_rules`` to ``quantise`` or ``freeze``.
    """

    layers: tuple[str, ...]
    row_dtype: str | None
    choices: Mapping[str, Choice]
    fixed_ms: float
    alternatives: Mapping[str, Point] = dataclasses.field(default_factory=dict)
    front: tuple[Point, ...] = ()

    @property
    def rows(self) -> tuple[str, ...]:
        """Patterns of the layers that are split by rows."""
        return tuple(map(_only, self.layers))

    @property
    def rules(self) -> tuple[tuple[str, dict[str, float]], ...]:
        """The densities, an exchange a rule."""
        return tuple((_only(p), {"density": c.density}) for p, c in self.choices.items())

    @property
    def wire_rules(self) -> tuple[tuple[str, str], ...]:
        """The wire dtypes, an exchange a rule."""
        return tuple((_only(p), c.wire_dtype) for p, c in self.choices.items())

    def __str__(self) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(self._exchanges(), self._points())
            console.print(f"by rows, exactly: {', '.join(self.layers) or 'nothing'}")
        return capture.get()

    def _exchanges(self) -> Table:
        table = Table("exchange", "density", "wire", "kept", "ms")
        for path, c in self.choices.items():
            table.add_row(path, f"{c.density:.3f}", c.wire_dtype, f"{c.kept:.3f}", f"{c.ms:.3f}")
        return table

    def _points(self) -> Table:
        """This plan, what it was chosen over, and the front that it lies on."""
        table = Table("", "latency (ms)", "of the weights", "kept")
        rows: list[tuple[str, Point]] = [("planned", self), *self.alternatives.items()]
        rows += [(f"at most {p.memory:.2f}", p) for p in self.front]
        for name, p in rows:
            table.add_row(name, f"{p.ms:.2f}", f"{p.memory:.3f}", f"{p.kept:.3f}")
        return table


def _only(path: str) -> str:
    return f"^{re.escape(path)}$"
