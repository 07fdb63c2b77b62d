"""One training step, compiled: loss, gradients, masks, moving average."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from disco_jax.mesh import NodeMesh
from disco_jax.sparsify import apply_masks
from disco_jax.tasks import classification

Batch = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes during training, as one pytree."""

    step: Int[Array, ""]  # int32[], batches so far
    params: nnx.State  # float32 weights
    rest: nnx.State  # running statistics, masks
    opt_state: optax.OptState
    ema: nnx.State | None  # moving average of params, None if there is none

    @classmethod
    def create(
        cls, model: nnx.Module, tx: optax.GradientTransformation, *, mesh: NodeMesh, ema: bool
    ) -> TrainState:
        """The state before the first step; it does not share memory with ``model``."""
        _, *split = nnx.split(model, nnx.Param, ...)
        params, rest = jax.tree.map(jnp.copy, split)
        average = jax.tree.map(jnp.copy, params) if ema else None
        state = cls(jnp.zeros((), jnp.int32), params, rest, tx.init(params), average)
        placed = mesh.jax_mesh.devices.size
        return jax.tree.map(
            lambda x: x if len(x.sharding.device_set) == placed and x.ndim else mesh.put(x), state
        )

    def write_to(self, model: nnx.Module) -> None:
        """Copies weights (their moving average, if there is one), statistics, masks to a model."""
        nnx.update(model, self.params if self.ema is None else self.ema, self.rest)


def train_step(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    state: TrainState,
    *,
    label_smoothing: float = 0.0,
    ema_decay: float = 0.0,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Float[Array, ""]]]:
    """Compiles ``state, {"image", "label"} -> state, loss`` for a model and an optimiser.

    ``accumulate`` is the number of batches that the optimiser takes for one update. Masks that it
    carries (``sparse_exchange``) are copied to the model's exchanges.
    The state keeps the placement of the given one, whose memory each step reuses.
    """
    model.train()
    graphdef, _ = nnx.split(model)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Float[Array, ""]]:
        def loss_fn(params: nnx.State) -> tuple[Float[Array, ""], nnx.State]:
            model = nnx.merge(graphdef, params, state.rest, copy=True)
            logits = model(batch["image"])
            loss = classification.loss(logits, batch["label"], label_smoothing=label_smoothing)
            return loss, nnx.state(model, nnx.Not(nnx.Param))

        (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)  # type: ignore[arg-type]
        model = nnx.merge(graphdef, params, rest, copy=True)
        apply_masks(model, opt_state)
        ema: Any = None
        if state.ema is not None:
            # A young average forgets faster, or it would remember the random start; between
            # updates, while gradients accumulate, it stays as it is.
            updates_before = state.step // accumulate
            decay = jnp.minimum(ema_decay, (1 + updates_before) / (10 + updates_before))
            decay = jnp.where((state.step + 1) % accumulate == 0, decay, 1.0)
            ema = optax.incremental_update(params, state.ema, 1 - decay)  # type: ignore[arg-type]
        rest = nnx.state(model, nnx.Not(nnx.Param))
        return TrainState(state.step + 1, params, rest, opt_state, ema), loss

    placement = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(placement, None))
