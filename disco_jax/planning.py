"""How a config's ``plan`` section chooses rows, densities and wire dtypes, once, and keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from disco_jax import cost
from disco_jax.errors import require

FILE = "splits.json"


def choose(
    config: ConfigDict, model: nnx.Module, images: Callable[[], Iterable[Any]], workdir: Path
) -> cost.Planned | None:
    """Plans for a trained dense model; None if that was done before."""
    wanted, path = config.plan, workdir / FILE
    if path.exists():
        return None
    least = {(True, False): "memory", (False, True): "ms", (True, True): "loss"}
    planned = cost.plan_splits(
        model,
        np.concatenate(list(images())),
        cost.Link(wanted.mbit, wanted.link_ms),
        gmacs=wanted.gmacs,
        minimise=least[wanted.latency_ms is not None, wanted.memory is not None],
        ms=wanted.latency_ms,
        memory=wanted.memory,
        density=config.sparse.density,
        wire_dtypes=wanted.wire_dtypes,
        row_dtype=wanted.row_dtype,
    )
    names = ("rows", "row_dtype", "rules", "wire_rules")
    path.write_text(json.dumps({name: getattr(planned, name) for name in names}))
    return planned


def fill_in(config: ConfigDict, workdir: Path) -> None:
    """Puts into a config what was chosen, now or in an earlier process.

    Raises:
      DiscoError: if nothing was.
    """
    path = workdir / FILE
    require(
        path.exists(),
        f"`workdir` (={workdir}) has no {FILE}, which training writes; run --mode=train first",
    )
    chosen = json.loads(path.read_text())
    rules = tuple((pattern, override) for pattern, override in chosen["rules"])
    config.sparse.rules = (*config.sparse.rules, *rules)
    config.rows, config.row_dtype = tuple(chosen["rows"]), chosen["row_dtype"]
    config.wire_rules = tuple(map(tuple, chosen["wire_rules"]))
