"""The training loop: phases that can be interrupted anywhere and continue exactly."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from disco_jax.data.images import Source
from disco_jax.data.pipeline import evaluation_batches
from disco_jax.data.preprocess import Preprocess
from disco_jax.errors import DiscoError, require
from disco_jax.mesh import NodeMesh
from disco_jax.partition import batch_spec
from disco_jax.tasks.task import Task, shown
from disco_jax.train.checkpoint import Checkpoints
from disco_jax.train.progress import MetricsWriter, console, progress_bar
from disco_jax.train.step import Distillation, TrainState, train_step

# Whole programs, not one for each operation: programs that are independent of each other but
# wait for all devices can keep each other's devices busy for ever.
_norm = jax.jit(optax.tree.norm)
_measure = jax.jit(lambda task, outputs, batch: task.measure(outputs, batch), static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of training with an optimiser and checkpoints of its own.

    Attributes:
      name: ``"dense"`` or ``"sparse"``; names the checkpoint folder and the metrics.
      steps: updates in all.
      tx: the optimiser.
      steps_per_epoch: how often to validate.
      save_every: updates between checkpoints.
      keep: checkpoints kept.
      task, ema_decay, accumulate: see ``train_step``.
      settings: all that determines the result, stored with the checkpoints.
      distill, penalty: see ``train_step``.
    """

    name: str
    steps: int
    tx: optax.GradientTransformation
    steps_per_epoch: int
    save_every: int
    keep: int
    task: Task
    ema_decay: float
    accumulate: int
    settings: dict[str, Any]
    distill: Distillation | None = None
    penalty: Callable[[nnx.Module], jax.Array] | None = None


def put_batch(batch: dict[str, Any], mesh: NodeMesh) -> dict[str, jax.Array]:
    """Splits a batch over the data axis; every node gets all channels."""
    return {k: mesh.put(v, *batch_spec(v.ndim, mesh)) for k, v in batch.items()}


def fit(
    model: nnx.Module,
    phase: Phase,
    batches: grain.DatasetIterator,
    validate: Callable[[nnx.Module], dict[str, float]],
    *,
    mesh: NodeMesh,
    workdir: Path,
) -> None:
    """Trains ``model`` in place, from the newest checkpoint of the phase if there is one.

    Raises:
      DiscoError: if the loss is not finite, or a checkpoint does not fit. Checkpoints written
        before are left as they are.
    """
    checkpoints = Checkpoints(workdir / "checkpoints" / phase.name, keep=phase.keep)
    state = TrainState.create(model, phase.tx, mesh=mesh, ema=phase.ema_decay > 0)
    if checkpoints.latest is not None:
        state, position = checkpoints.restore(state, settings=phase.settings)
        batches.set_state(position)
        console.print(f"{phase.name}: going on from step {int(state.step)}")
    save = partial(checkpoints.save, settings=phase.settings)
    try:
        state = _run(model, state, phase, batches, validate, save, mesh, MetricsWriter(workdir))
    finally:
        checkpoints.close()
    state.write_to(model)


def _run(
    model: nnx.Module,
    state: TrainState,
    phase: Phase,
    batches: grain.DatasetIterator,
    validate: Callable[[nnx.Module], dict[str, float]],
    save: Callable[..., None],
    mesh: NodeMesh,
    metrics: MetricsWriter,
) -> TrainState:
    step_fn = train_step(
        model,
        phase.tx,
        state,
        task=phase.task,
        ema_decay=phase.ema_decay,
        accumulate=phase.accumulate,
        distill=phase.distill,
        penalty=phase.penalty,
    )
    first, mark, seen = int(state.step), time.perf_counter(), 0
    with progress_bar() as bar:
        task = bar.add_task(phase.name, total=phase.steps, completed=first, status="compiling")
        for step in range(first + 1, phase.steps + 1):
            batch = put_batch(next(batches), mesh)
            state, loss = step_fn(state, batch)
            seen += len(batch["image"])
            if step == first + 1:  # compilation is not throughput
                jax.block_until_ready(loss)
                mark, seen = time.perf_counter(), 0
            last = step == phase.steps
            validates = last or step % phase.steps_per_epoch == 0
            if validates or step % phase.save_every == 0 or step % 10 == 0:
                value = _finite(float(loss), phase, step)
                rate = seen / max(time.perf_counter() - mark, 1e-9)
                bar.update(task, completed=step, status=f"loss {value:.3f} {rate:.0f} images/s")
                metrics.write(phase.name, step, loss=value, images_per_second=rate)
                mark, seen = time.perf_counter(), 0
            if validates:
                state.write_to(model)
                found = validate(model)
                metrics.write(phase.name, step, **found)
                metric = phase.task.metric
                reached = shown(found[metric], phase.task.unit)
                console.print(f"{phase.name} step {step}: validation {metric} {reached}")
                mark = time.perf_counter()
            if last or step % phase.save_every == 0:
                _finite(float(_norm(state.params)), phase, step)
                save(state, data=batches.get_state())
    return state


def _finite(value: float, phase: Phase, step: int) -> float:
    """Loss, or norm of the weights: nothing that is not finite is ever saved."""
    if math.isfinite(value):
        return value
    raise DiscoError(
        f"`loss` or weights (={value}) at step {step} of phase {phase.name!r} are not finite; "
        f"lower {phase.name}.learning_rate or set optimizer.clip_norm, and start in another "
        "--workdir (the checkpoints in this one are from before)"
    )


def evaluate(
    task: Task,
    run: Callable[[jax.Array], Any],
    source: Source,
    preprocess: Preprocess,
    batch_size: int,
    *,
    mesh: NodeMesh,
) -> dict[str, float]:
    """The task's metrics over a whole split.

    Args:
      task: what is measured.
      run: images to outputs (a ``Program`` or a ``Frozen``).
      source: the images.
      preprocess: how they are prepared.
      batch_size: images at a time; must divide by the mesh's ``data``.
      mesh: where ``run`` runs.
    """
    require(
        batch_size % mesh.data == 0,
        f"`eval_batch_size` (={batch_size}) must be divisible by `data` (={mesh.data}); choose a "
        "multiple",
    )
    found = []
    for batch in evaluation_batches(source, preprocess, batch_size):
        outputs = run(jnp.asarray(batch.pop("image")))
        truth = {k: mesh.put(v, *[None] * v.ndim) for k, v in batch.items()}
        found.append(jax.device_get(_measure(task, outputs, truth)))
    return task.summary(found)
