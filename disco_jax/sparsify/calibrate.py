"""What a few images, without labels, say about a model: channel norms, running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.readable import recording
from disco_jax.trace import exchanges

Images = Iterable[Float[Array | np.ndarray, "b ..."]]


def observe(
    model: nnx.Module, see: Callable[[dict[str, list[Array]]], Any]
) -> Callable[[nnx.Module, Any], Any]:
    """Compiles ``model, images -> see({exchange path: its inputs in order})``, evaluation mode.

    One compilation serves all models of the same structure.
    """
    clone = nnx.clone(model)
    clone.eval()
    graphdef, _ = nnx.split(clone)

    @jax.jit
    def run(state: Any, images: Any) -> Any:
        merged = nnx.merge(graphdef, state)
        names = {id(e): path for path, e in exchanges(merged).items()}
        with recording() as events:
            merged(images)  # type: ignore[operator]
        inputs: dict[str, list[Array]] = {}
        for module, x in events:
            if id(module) in names:
                inputs.setdefault(names[id(module)], []).append(x)
        return see(inputs)

    return lambda model, images: run(nnx.state(model), images)


def channel_norms(model: nnx.Module, images: Images) -> dict[str, Float[Array, "channel"]]:
    """Root mean square of every channel that an exchange is given, over examples and positions.

    Args:
      model: a masked model; its masks count.
      images: batches.

    Raises:
      DiscoError: if there is no batch.
    """

    def squares(inputs: dict[str, list[Array]]) -> dict[str, Array]:
        return {
            path: sum((jnp.mean(jnp.square(x), range(x.ndim - 1)) for x in xs), jnp.zeros(()))
            / len(xs)
            for path, xs in inputs.items()
        }

    run = observe(model, squares)
    found = [run(model, batch) for batch in images]
    require(bool(found), "`images` (=no batch) must have at least one batch of images")
    return jax.tree.map(lambda *xs: jnp.sqrt(sum(xs) / len(xs)), *found)


def outputs(model: nnx.Module) -> Callable[[nnx.Module, Any], Any]:
    """Compiles ``model, images -> output`` in evaluation mode, once for all of one structure."""
    clone = nnx.clone(model)
    clone.eval()
    graphdef, _ = nnx.split(clone)
    run = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))  # type: ignore[operator]
    return lambda model, images: run(nnx.state(model), images)


class Statistics:
    """The running statistics of batch norms, taken anew; compiled once for one model's structure.

    After channels were dropped, the statistics gathered before are those of another network.
    """

    def __init__(self, model: nnx.Module):
        clone = nnx.clone(model)
        clone.train()
        for module in _modules(clone):
            if isinstance(module, nnx.BatchNorm):
                module.momentum = 0.0  # the statistics of this batch alone
        graphdef, _ = nnx.split(clone)

        def run(state: Any, batch: Any) -> Any:
            merged = nnx.merge(graphdef, state)
            merged(batch)  # type: ignore[operator]
            return nnx.state(merged, nnx.BatchStat)

        self._run = jax.jit(run)

    def __call__(self, model: nnx.Module, images: Images, *, means_only: bool = False) -> None:
        """Sets the means over ``images``, in place; ``means_only`` leaves the variances."""
        found = [self._run(nnx.state(model), batch) for batch in images]
        require(bool(found), "`images` (=no batch) must have at least one batch of images")
        new = jax.tree.map(lambda *xs: sum(xs) / len(xs), *found)
        flat = nnx.to_flat_state(new)
        kept = [(path, v) for path, v in flat if not (means_only and path[-1] == "var")]
        nnx.update(model, nnx.from_flat_state(kept))


def reestimate_statistics(model: nnx.Module, images: Images) -> None:
    """Replaces the running statistics of batch norms by the means over ``images``, in place.

    Args:
      model: a masked model.
      images: batches.

    Raises:
      DiscoError: if there is no batch.
    """
    Statistics(model)(model, images)


def _modules(model: nnx.Module) -> list[Any]:
    return [module for _, module in nnx.iter_modules(model)]
