"""Masks learned as optax state, and masks set in one shot."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from disco_jax.errors import require
from disco_jax.mesh import NodeMesh
from disco_jax.sparsify.budget import uniform
from disco_jax.sparsify.schedules import SCHEDULES
from disco_jax.sparsify.scores import SCORES
from disco_jax.trace import exchanges, readers

Masks = dict[str, Bool[Array, "node channel"]]
Kernels = dict[str, list[Array]]
Scores = dict[str, Float[Array, "node channel"]]
Readers = tuple[tuple[str, str, int], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseExchangeState:
    """State of :func:`sparse_exchange`."""

    step: Int[Array, ""]  # int32[], updates so far
    masks: Masks  # bool[node, channel] for each exchange path
    inner: optax.OptState  # of the wrapped optimiser
    # Static, because an optimiser is given bare arrays when it updates:
    readers: Readers = dataclasses.field(
        metadata={"static": True}
    )  # (parameter, exchange, features)
    mesh: NodeMesh = dataclasses.field(metadata={"static": True})


def sparse_exchange(
    inner: optax.GradientTransformation,
    *,
    density: float,
    steps: int,
    score: str = "l2",
    schedule: str = "cubic",
    every: int = 10,
) -> optax.GradientTransformationExtraArgs:
    """Learns which channels cross the link while ``inner`` learns the weights.

    Every ``every`` updates, and for the last time after ``steps`` of them, all (node, channel)
    pairs are scored by the weights that read them and the best are kept, as many as the schedule
    allows. The masks are optax state: call :func:`apply_masks` after each update so that the model
    uses them.

    Args:
      inner: the optimiser of the weights.
      density: share of remote pairs that is left in the end, 0 to 1.
      steps: update after which the masks no longer change.
      score: a key of ``SCORES``.
      schedule: a key of ``SCHEDULES``.
      every: updates between two choices of masks.

    Raises:
      DiscoError: for a density outside [0, 1] or an unknown name; in ``init``, if no parameter
        says which exchange it reads.
    """
    check_choice(density, score)
    require(
        schedule in SCHEDULES,
        f"`schedule` (={schedule!r}) must be one of {', '.join(SCHEDULES)}; choose one of these",
    )
    require(every >= 1, f"`every` (={every}) must be at least 1 update; pass every=1 for each")
    density_at = SCHEDULES[schedule](density, steps)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> SparseExchangeState:
        readers, mesh = kernel_readers(params)
        require(
            mesh is not None,
            "`params` hold no kernel that names its exchange; pass nnx.state(model, nnx.Param) of "
            "a model from models.create, or call disco_jax.name_exchanges(model) first",
        )
        assert mesh is not None
        masks = choose_masks(score_kernels(params, readers, mesh, score), readers, 1.0)
        step = jnp.zeros((), jnp.int32)
        return SparseExchangeState(step, masks, inner.init(params), readers, mesh)

    def update(
        grads: Any, state: SparseExchangeState, params: Any = None, **extra: Any
    ) -> tuple[Any, SparseExchangeState]:
        require(
            params is not None,
            "`params` is missing; call update(grads, state, params): masks are "
            "chosen by the weights",
        )
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        step = state.step
        due = ((step % every == 0) & (step < steps)) | (step == steps)
        masks = jax.lax.cond(
            due,
            lambda scores, _: choose_masks(scores, state.readers, density_at(step)),
            lambda _, masks: masks,
            score_kernels(params, state.readers, state.mesh, score),
            state.masks,
        )
        after = dataclasses.replace(state, step=step + 1, masks=masks, inner=inner_state)
        return updates, after

    return optax.GradientTransformationExtraArgs(init, update)


def kernel_readers(params: Any) -> tuple[Readers, NodeMesh | None]:
    """(parameter, exchange, features) of kernels whose metadata names them, and the mesh."""
    leaves = jax.tree.leaves_with_path(params, is_leaf=_is_variable)
    data = [(_name(path), v.get_metadata()) for path, v in leaves if _is_variable(v)]
    named = [(name, metadata) for name, metadata in data if "exchange" in metadata]
    mesh = named[0][1]["node_mesh"] if named else None
    return tuple((name, m["exchange"], m["features"]) for name, m in named), mesh


def group_kernels(params: Any, readers: Readers) -> Kernels:
    """The kernels that read each exchange."""
    leaves = jax.tree.leaves_with_path(params, is_leaf=_is_variable)
    arrays = {_name(path): v[...] if _is_variable(v) else v for path, v in leaves}
    groups: Kernels = {}
    for name, exchange, _ in readers:
        groups.setdefault(exchange, []).append(arrays[name])
    return groups


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def score_kernels(params: Any, readers: Readers, mesh: NodeMesh, score: str) -> Scores:
    """Scores of all exchanges, whole on every device.

    They are computed at every update, outside the condition that chooses masks: devices that
    wait for each other inside a condition, while others outside do, can wait for ever.
    """
    kernels = group_kernels(params, readers)
    return mesh.replicate({p: SCORES[score](group, mesh.nodes) for p, group in kernels.items()})


def choose_masks(scores: Scores, readers: Readers, density: float | Array) -> Masks:
    """Keeps the best pairs of every exchange; dead channels are never read."""
    features = {exchange: count for _, exchange, count in readers}
    return {path: uniform(s, density, features[path]) for path, s in scores.items()}


def apply_masks(model: nnx.Module, state: Any) -> None:
    """Copies the masks in an optimiser state (anywhere in its tree) into the model."""
    found = [s for s in _states(state) if isinstance(s, SparseExchangeState)]
    masks = found[0].masks if found else {}
    for path, exchange in exchanges(model).items():
        if path in masks:
            exchange.mask.set_value(masks[path])


def _states(state: Any) -> list[Any]:
    return jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, SparseExchangeState))


def prune(model: nnx.Module, density: float, score: str = "l2", **options: Any) -> None:
    """Sets every mask in place, in one shot, to the best ``density`` of its remote pairs.

    Args:
      model: a masked model.
      density: share of the remote (node, channel) pairs of each exchange to keep.
      score: a key of ``SCORES``.
      **options: what the score takes (``seed`` for ``"random"``).

    Raises:
      DiscoError: for a density outside [0, 1], an unknown score, an option that the score does
        not take, or a model without masked exchanges.
    """
    check_choice(density, score)
    takes = set(inspect.signature(SCORES[score]).parameters) - {"kernels", "nodes"}
    require(
        set(options) <= takes,
        f"`score` {score!r} does not take {sorted(set(options) - takes)}; it takes "
        f"{sorted(takes) or 'nothing'}",
    )
    found = exchanges(model)
    require(
        bool(found),
        f"`model` (={type(model).__name__}) has no masked exchange; pass a model made of "
        "disco_jax layers that is not frozen",
    )
    kernels = {
        path: [layer.kernel[...] for _, layer in layers]
        for path, layers in readers(model).items()
        if layers
    }

    def choose(kernels: dict[str, list[Array]]) -> Masks:
        return {
            path: uniform(
                SCORES[score](group, found[path].mesh.nodes, **options),
                density,
                found[path].features,
            )
            for path, group in kernels.items()
        }

    for path, mask in jax.jit(choose)(kernels).items():  # one program, not one for each shape
        found[path].set_mask(mask)


def check_choice(density: float, score: str) -> None:
    """Refuses a density or a score that does not exist."""
    require(
        0 <= density <= 1,
        f"`density` (={density}) must be between 0 (nodes never talk) and 1 (dense split); "
        "choose a share, such as 0.2",
    )
    require(
        score in SCORES,
        f"`score` (={score!r}) must be one of {', '.join(SCORES)}; choose one of these",
    )
