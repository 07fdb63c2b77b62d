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

from disco_jax.exchange import Exchange
from disco_jax.mesh import NodeMesh
from disco_jax.readable import recording
from disco_jax.sparsify import apply_masks
from disco_jax.tasks import distillation
from disco_jax.tasks.classification import Classification
from disco_jax.tasks.task import Task

Batch = dict[str, Array]
Observed = tuple[Any, list[Array]]  # outputs, and the inputs of all exchanges in order


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


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What a model learns from a teacher beside the truth.

    Attributes:
      teacher: a model with the same exchanges, often the same weights with full masks. It is not
        changed.
      weight: share of the task's imitation in the loss; the truth has the rest.
      temperature: of soft labels.
      features: weight of the difference between what student and teacher send to the exchanges.
    """

    teacher: nnx.Module
    weight: float = 0.9
    temperature: float = 4.0
    features: float = 0.0

    def loss(
        self, task: Task, truth: Array, student: Observed, teacher: Observed
    ) -> Float[Array, ""]:
        """The loss from that against the truth, and what both networks gave."""
        soft = task.imitation(student[0], teacher[0], self.temperature)
        loss = (1 - self.weight) * truth + self.weight * soft
        if not self.features:
            return loss
        return loss + self.features * distillation.features(student[1], teacher[1])


def _observe(model: nnx.Module, images: Array) -> Observed:
    with recording() as events:
        outputs = model(images)  # type: ignore[operator]
    return outputs, [x for module, x in events if isinstance(module, Exchange)]


def train_step(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    state: TrainState,
    *,
    task: Task | None = None,
    ema_decay: float = 0.0,
    accumulate: int = 1,
    distill: Distillation | None = None,
    penalty: Callable[[nnx.Module], Float[Array, ""]] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Float[Array, ""]]]:
    """Compiles ``state, batch -> state, loss`` for a model and an optimiser.

    ``task`` is what the model is trained for, classification by default.
    ``accumulate`` is the number of batches that the optimiser takes for one update. Masks that it
    carries (``sparse_exchange``) are copied to the model's exchanges. ``penalty`` is a term of the
    loss that depends on the model alone.
    The state keeps the placement of the given one, whose memory each step reuses.
    """
    model.train()
    task = task or Classification()
    graphdef, _ = nnx.split(model)
    teacher = _frozen(distill.teacher) if distill else None

    def step(
        state: TrainState, batch: Batch, teacher_leaves: Any
    ) -> tuple[TrainState, Float[Array, ""]]:
        def loss_fn(params: nnx.State) -> tuple[Float[Array, ""], nnx.State]:
            model = nnx.merge(graphdef, params, state.rest, copy=True)
            student = _observe(model, batch["image"])
            loss = task.loss(student[0], batch)
            if distill and teacher:
                shown = _observe(teacher[0](teacher_leaves), batch["image"])
                loss = distill.loss(task, loss, student, jax.lax.stop_gradient(shown))
            if penalty:
                loss += penalty(model)
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
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(placement, None))
    leaves = teacher[1] if teacher else ()
    return lambda state, batch: compiled(state, batch, leaves)


def _frozen(model: nnx.Module) -> tuple[Callable[[list[Array]], nnx.Module], list[Array]]:
    """A model in evaluation mode as a function of its numbers, and copies of these."""
    model = nnx.clone(model)
    model.eval()
    graphdef, state = nnx.split(model)
    tree: Any
    leaves, tree = jax.tree.flatten(state)
    return lambda leaves: nnx.merge(graphdef, tree.unflatten(leaves)), leaves
