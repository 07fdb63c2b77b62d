"""Masks in one shot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.sparsify.budget import Budget
from disco_jax.sparsify.choice import Choice, Masks, Rules
from disco_jax.trace import exchanges, readers


def prune(
    model: nnx.Module,
    density: float,
    score: str | Mapping[str, Float[Array, "node channel"]] = "l2",
    *,
    budget: str | Budget = "uniform",
    costs: Mapping[str, float] | None = None,
    rules: Rules = (),
    norms: Mapping[str, Float[Array, "channel"]] | None = None,
    seed: int = 0,
    **options: Any,
) -> None:
    """Sets every mask in place, in one shot, to the best ``density`` of the remote pairs.

    Args:
      model: a masked model.
      density, score, budget, costs, rules, norms, seed, **options: see :class:`Choice`.

    Raises:
      DiscoError: for a density outside [0, 1], an unknown name, a score that needs gradients, or a
        model without masked exchanges.
    """
    choice = Choice(density, score, budget, costs, tuple(rules), norms, seed, options)
    found = exchanges(model)
    require(
        bool(found),
        f"`model` (={type(model).__name__}) has no masked exchange; pass a model made of "
        "disco_jax layers that is not frozen",
    )
    reading = {path: layers for path, layers in readers(model).items() if layers}
    kernels = {path: [layer.kernel[...] for _, layer in layers] for path, layers in reading.items()}
    named = tuple((path, path, found[path].features) for path in kernels)
    mesh = next(iter(found.values())).mesh

    @jax.jit  # one program, not one for each shape
    def choose(kernels: dict[str, list[Array]]) -> Masks:
        return choice.masks(choice.scores(kernels, named, mesh))

    for path, mask in choose(kernels).items():
        found[path].set_mask(mask)
