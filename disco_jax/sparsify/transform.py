"""Masks learned as optax state, and masks set in one shot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from disco_jax.errors import require
from disco_jax.mesh import NodeMesh
from disco_jax.partition import owned
from disco_jax.readable import expand_mask
from disco_jax.sparsify.budget import Budget
from disco_jax.sparsify.choice import Choice, Masks, Rules
from disco_jax.sparsify.groups import (
    Kernels,
    Readers,
    Scores,
    group_kernels,
    kernel_readers,
    map_kernels,
    metadata,
)
from disco_jax.sparsify.schedules import SCHEDULES
from disco_jax.sparsify.scores import l2
from disco_jax.trace import Images, exchanges, readers, trace

REGROW = ("none", "gradient", "feedback")
MEMORY = 0.9  # of the running means of what gradients say, for each update


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseExchangeState:
    """State of :func:`sparse_exchange`."""

    step: Int[Array, ""]  # int32[], updates so far
    masks: Masks  # bool[node, channel] for each exchange path
    scores: Scores  # float32[node, channel], running means of scores made of gradients, or {}
    growth: Scores  # float32[node, channel], running means of gradient norms, or {}
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
    score: str | Mapping[str, Float[Array, "node channel"]] = "l2",
    schedule: str = "cubic",
    every: int = 10,
    budget: str | Budget = "uniform",
    costs: Mapping[str, float] | None = None,
    rules: Rules = (),
    regrow: str = "none",
    turnover: float = 0.3,
    lasso: float = 0.0,
    norms: Mapping[str, Float[Array, "channel"]] | None = None,
    seed: int = 0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Learns which channels cross the link while ``inner`` learns the weights.

    In the first of every ``every`` updates, and for the last time in update ``steps``, all (node,
    channel) pairs are scored by the weights that read them and the best are kept, as many as
    schedule and budget allow. The masks are optax state: call :func:`apply_masks` after each
    update so that the model uses them.

    Args:
      inner: the optimiser of the weights.
      density, score, budget, costs, rules, norms, seed, **options: see :class:`Choice`.
      steps: update that chooses the masks for the last time; train on for some more.
      schedule: a key of ``SCHEDULES``.
      every: updates between two choices of masks.
      regrow: how a dropped pair can return; both ways need ``allow_regrowth(model)`` first.
        ``"none"``: it stays as it was dropped, up to weight decay. ``"gradient"``: at each choice
        ``turnover · (1 + cos(π t/T))/2`` of the budget goes to the dropped pairs whose weights have
        the largest gradient (RigL, Evci et al. 2020; they return with the weights they had, Ma et
        al. 2021). ``"feedback"``: dropped weights go on learning from the gradient at the masked
        model, and return when their score has become high enough (Lin et al. 2020).
      turnover: see ``regrow``.
      lasso: strength of a group lasso on remote pairs, ``lasso · t/T · Σ ‖w_g‖`` in the loss, that
        grows until the masks are final (Wen et al. 2016; growing: Wang et al. 2021).

    Raises:
      DiscoError: for a density outside [0, 1] or an unknown name; in ``init``, if no parameter
        says which exchange it reads, or a rule is not used.
    """
    choice = Choice(density, score, budget, costs, tuple(rules), norms, seed, options)
    _check_schedule(schedule, every, regrow, turnover)
    require(steps >= 0, f"`steps` (={steps}) must be 0 or more updates; 0 and 1 prune in the first")
    require(lasso >= 0, f"`lasso` (={lasso}) must be 0 (none) or more; choose one, such as 1e-4")
    wrapped = optax.with_extra_args_support(inner)
    pruning = _Pruning(choice, wrapped, steps, schedule, every, regrow, turnover, lasso)
    return optax.GradientTransformationExtraArgs(pruning.init, pruning.update)


@dataclasses.dataclass(frozen=True)
class _Pruning:
    """What :func:`sparse_exchange` was given, and what it does with it."""

    choice: Choice
    inner: optax.GradientTransformationExtraArgs
    steps: int
    schedule: str
    every: int
    regrow: str
    turnover: float
    lasso: float

    def init(self, params: Any) -> SparseExchangeState:
        found, mesh = kernel_readers(params)
        require(
            mesh is not None,
            "`params` hold no kernel that names its exchange; pass nnx.state(model, nnx.Param) of "
            "a model from models.create, or call disco_jax.name_exchanges(model) first",
        )
        assert mesh is not None
        kernels = group_kernels(params, found)
        require(
            self.regrow == "none" or _allows_regrowth(params),
            f"`regrow` (={self.regrow!r}) needs gradients of weights that nobody reads; call "
            "sparsify.allow_regrowth(model) before the optimiser is made",
        )
        zeros = {
            p: jnp.zeros((mesh.nodes, k[0].shape[-2]), jnp.float32) for p, k in kernels.items()
        }
        now = self.choice.scores(kernels, found, mesh, grads=kernels)
        return SparseExchangeState(
            jnp.zeros((), jnp.int32),
            self.choice.masks(now, left=1.0),
            dict(zeros) if self.choice.needs_gradients() else {},
            dict(zeros) if self.regrow == "gradient" else {},
            self.inner.init(params),
            found,
            mesh,
        )

    def update(
        self, grads: Any, state: SparseExchangeState, params: Any = None, **extra: Any
    ) -> tuple[Any, SparseExchangeState]:
        require(
            params is not None,
            "`params` is missing; call update(grads, state, params): masks are "
            "chosen by the weights",
        )
        kernels = group_kernels(params, state.readers)
        given = self._gradients(grads, state, params, kernels)
        updates, inner = self.inner.update(given, state.inner, params, **extra)
        slopes = group_kernels(grads, state.readers)

        def scores() -> Scores:
            return self.choice.scores(kernels, state.readers, state.mesh, grads=slopes)

        averages = _mean(state, state.scores, scores)
        growth = _mean(
            state, state.growth, lambda: {p: l2(g, state.mesh.nodes) for p, g in slopes.items()}
        )
        masks = self._masks(state, averages, growth, scores)
        after = dataclasses.replace(
            state, step=state.step + 1, masks=masks, scores=averages, growth=growth, inner=inner
        )
        return updates, after

    def _gradients(
        self, grads: Any, state: SparseExchangeState, params: Any, kernels: Kernels
    ) -> Any:
        """What the wrapped optimiser sees."""
        given = grads if self.regrow != "gradient" else _of_kept(grads, state)
        if not self.lasso:
            return given
        strength = self.lasso * self._way(state) * (state.step < self.steps - 1)
        return _add_lasso(given, params, kernels, state, strength)

    def _masks(
        self,
        state: SparseExchangeState,
        averages: Scores,
        growth: Scores,
        scores: Callable[[], Scores],
    ) -> Masks:
        """The next choice where one is due, or those of before."""
        mesh, step = state.mesh, state.step
        # Scores are made whole on every device outside the condition: devices that wait for each
        # other inside a condition, while others outside do, can wait for ever.
        ready = averages or (mesh.replicate(scores()) if mesh.distributed else None)

        def choose() -> Masks:
            now = scores() if ready is None else ready
            t = self._way(state)
            left = SCHEDULES[self.schedule](t)
            if not growth:
                return self.choice.masks(now, left)
            swap = self.turnover * (1 + jnp.cos(jnp.pi * jnp.minimum(t, 1.0))) / 2
            return self.choice.regrown(now, growth, state.masks, left, swap)

        last = max(self.steps - 1, 0)  # counted from 0
        due = ((step % self.every == 0) & (step < last)) | (step == last)
        return jax.lax.cond(due, choose, lambda: state.masks)

    def _way(self, state: SparseExchangeState) -> Array:
        """How far the schedule is: 0 in the first update, 1 in update ``steps``."""
        return state.step / (self.steps - 1) if self.steps > 1 else jnp.ones(())


def _mean(state: SparseExchangeState, before: Scores, now: Callable[[], Scores]) -> Scores:
    """The running mean after one more update; {} where there is none."""
    if not before:
        return before
    after = now()
    return state.mesh.replicate(optax.tree.add_scale(after, MEMORY, optax.tree.sub(before, after)))


def _of_kept(grads: Any, state: SparseExchangeState) -> Any:
    """Gradients of the weights that are read; 0 for the others."""
    return map_kernels(
        lambda g, path: g * expand_mask(state.masks[path], g.shape[-1]).astype(g.dtype),
        grads,
        state.readers,
    )


def _add_lasso(
    grads: Any, params: Any, kernels: Kernels, state: SparseExchangeState, strength: Array
) -> Any:
    """Adds the gradient of ``strength · Σ ‖w_g‖`` over remote pairs: ``strength · w / ‖w_g‖``."""
    pull = {}
    for path, group in kernels.items():
        norms = l2(group, state.mesh.nodes)
        remote = ~owned(norms.shape[1], state.mesh.nodes)
        pull[path] = strength * remote / jnp.maximum(norms, 1e-12)
    pulled = map_kernels(
        lambda k, path: k * expand_mask(pull[path], k.shape[-1]).astype(k.dtype),
        jax.tree.map(jnp.asarray, params),
        state.readers,
        others=jnp.zeros_like,
    )
    return optax.tree.add(grads, pulled)


def _allows_regrowth(params: Any) -> bool:
    return all(m.get("dense_gradient", False) for _, m in metadata(params) if "exchange" in m)


def allow_regrowth(model: nnx.Module) -> None:
    """Gives dropped weights the gradient that they would have if they were read, in place.

    What the model computes stays the same.
    """
    for exchange in exchanges(model).values():
        exchange.dense_gradient = True
    for layers in readers(model).values():
        for _, layer in layers:
            layer.kernel.set_metadata(dense_gradient=True)


def wire_costs(model: nnx.Module, images: Images, *, itemsize: int = 4) -> dict[str, float]:
    """Bytes per example of one channel on one link, for every exchange: positions x ``itemsize``.

    Of a map that is split by rows a reader has some of each channel's positions already.

    Args:
      model: a masked model.
      images: the input, or its ``jax.ShapeDtypeStruct``.
      itemsize: bytes of the wire dtype.
    """
    found = exchanges(model)
    costs = dict.fromkeys(found, 0.0)
    for record in trace(model, images).exchanges:
        if record.path in costs:
            nodes, from_rows = found[record.path].mesh.nodes, found[record.path].from_rows
            share = (nodes - 1) / nodes if from_rows else 1.0
            costs[record.path] += share * record.positions * itemsize
    return costs


def apply_masks(model: nnx.Module, state: Any) -> None:
    """Copies the masks in an optimiser state (anywhere in its tree) into the model."""
    masks = find_masks(state)
    for path, exchange in exchanges(model).items():
        if path in masks:
            exchange.mask.set_value(masks[path])


def find_masks(state: Any) -> Masks:
    """The masks in an optimiser state (anywhere in its tree) by exchange; {} if it has none."""
    found = [s for s in _states(state) if isinstance(s, SparseExchangeState)]
    return found[0].masks if found else {}


def _states(state: Any) -> list[Any]:
    return jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, SparseExchangeState))


def _check_schedule(schedule: str, every: int, regrow: str, turnover: float) -> None:
    require(
        schedule in SCHEDULES,
        f"`schedule` (={schedule!r}) must be one of {', '.join(SCHEDULES)}; choose one of these",
    )
    require(every >= 1, f"`every` (={every}) must be at least 1 update; pass every=1 for each")
    require(
        regrow in REGROW,
        f"`regrow` (={regrow!r}) must be one of {', '.join(REGROW)}; choose one of these",
    )
    require(
        0 <= turnover <= 1,
        f"`turnover` (={turnover}) must be between 0 and 1: the share of the budget that is given "
        "to dropped pairs; choose one, such as 0.3",
    )
