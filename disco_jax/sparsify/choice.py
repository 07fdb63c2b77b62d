"""One choice of masks: score, budget, and the rules that override them for single exchanges."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from disco_jax.errors import require
from disco_jax.mesh import NodeMesh
from disco_jax.rules import first_match
from disco_jax.sparsify.budget import BUDGETS, Budget, columns, relative, uniform
from disco_jax.sparsify.groups import Kernels, Readers, Scores, bury_dead, score_groups
from disco_jax.sparsify.scores import SCORES

Masks = dict[str, Bool[Array, "node channel"]]
Rules = Sequence[tuple[str, Mapping[str, Any]]]
# Other scores depend on the scale of a layer, and become shares before exchanges are compared.
COMPARABLE = ("none", "random", "reconstruction", "taylor")
FORCED = 1e6  # more than any share is worth for each byte


@dataclasses.dataclass(frozen=True)
class Choice:
    """How masks are chosen.

    Attributes:
      density: share of the remote (node, channel) pairs that is kept, 0 to 1.
      score: a key of ``SCORES``, or scores themselves, ``[node, channel]`` for every exchange.
      budget: a key of ``BUDGETS``, or a function like those.
      costs: bytes of a channel on a link for every exchange, from ``wire_costs``; the budgets
        that compare exchanges need them.
      rules: ``(pattern, {"density": ..., "score": ...})``: the first pattern that is found in an
        exchange's path (a regular expression) overrides what it names. An exchange with a density
        of its own is not part of the others' budget.
      norms: for every exchange ``[channel]``, from ``channel_norms``; for the score
        ``"activation"``.
      seed: for the score ``"random"``.
      options: keywords of the budget (``floor``, ``charge``, ``level``).

    Raises:
      DiscoError: for a density outside [0, 1], an unknown name, or what a score needs and lacks.
    """

    density: float
    score: str | Mapping[str, Float[Array, "node channel"]] = "l2"
    budget: str | Budget = "uniform"
    costs: Mapping[str, float] | None = None
    rules: Rules = ()
    norms: Mapping[str, Float[Array, "channel"]] | None = None
    seed: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice(self.density, self.score)
        require(
            callable(self.budget) or self.budget in BUDGETS,
            f"`budget` (={self.budget!r}) must be one of {', '.join(BUDGETS)}; choose one of these",
        )
        require(
            self.budget not in ("by_cost", "per_link") or self.costs is not None,
            f"`costs` is missing, which budget={self.budget!r} needs; pass "
            "costs=sparsify.wire_costs(model, images)",
        )
        takes = set(inspect.signature(self._budget).parameters) - {"scores", "costs", "density"}
        wrong = sorted(set(self.options) - takes)
        require(
            not wrong,
            f"`budget` {self.budget!r} does not take {wrong}; it takes "
            f"{sorted(takes) or 'nothing'}",
        )
        for pattern, override in self.rules:
            wrong = sorted(set(override) - {"density", "score"})
            require(
                not wrong,
                f"`rules` entry {pattern!r} overrides {wrong}, but only 'density' and 'score' can "
                "be overridden; remove it",
            )
            check_choice(override.get("density", 0), override.get("score", "l2"))

    @property
    def _budget(self) -> Budget:
        return BUDGETS[self.budget] if isinstance(self.budget, str) else self.budget

    def overrides(self, paths: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        """For each exchange what the first matching rule says.

        Raises:
          DiscoError: if a rule matches first for no exchange.
        """
        return first_match(self.rules, paths)

    def needs_gradients(self) -> bool:
        """Whether some exchange is scored by gradients."""
        scores = [self.score, *(r.get("score", self.score) for _, r in self.rules)]
        return "taylor" in [s for s in scores if isinstance(s, str)]

    def scores(self, kernels: Kernels, readers: Readers, mesh: NodeMesh, **given: Any) -> Scores:
        """Scores of all exchanges, comparable; ``given`` is what some score needs by name."""
        rules = self.overrides(list(kernels))
        if self.norms is not None:
            given = {"norms": self.norms, **given}
        found: Scores = {}
        for path, group in kernels.items():
            score = rules.get(path, {}).get("score", self.score)
            if isinstance(score, str):
                needed = {k: v for k, v in given.items() if k in NEEDS.get(score, ())}
                lacking = set(NEEDS.get(score, ())) - set(needed)
                require(
                    not lacking,
                    f"`score` {score!r} needs {sorted(lacking)}; pass them, or choose another",
                )
                one = score_groups(score, {path: group}, mesh, seed=self.seed, **needed)
            else:
                one = {path: jnp.asarray(score[path])}
            one = bury_dead(one, readers)
            found |= one if score in COMPARABLE or not isinstance(score, str) else relative(one)
        return found

    def masks(
        self, scores: Scores, left: float | Float[Array, ""] = 0.0, turnover: Any = 0.0
    ) -> Masks:
        """The masks that the budget buys, while ``left`` of the way from dense is still to go.

        ``turnover``, of every exchange's budget in whole columns, is not spent.
        """
        rules = self.overrides(list(scores))
        own = {p: rules.get(p, {}).get("density") for p in scores}
        final = {p: self.density if d is None else d for p, d in own.items()}
        density = {p: s + (1 - s) * left for p, s in final.items()}
        size = {p: max(1, columns(s)) for p, s in scores.items()}
        density = {p: d - jnp.floor(turnover * d * size[p]) / size[p] for p, d in density.items()}
        budget = partial(self._budget, **self.options)
        fixed = {p: s for p, s in scores.items() if own[p] is not None}
        ranked = {p: s for p, s in scores.items() if own[p] is None}
        masks = uniform(fixed, self.costs, density) | budget(ranked, self.costs, density)
        return {p: masks[p] for p in scores}

    def regrown(
        self, scores: Scores, growth: Scores, masks: Masks, left: Any, turnover: Any
    ) -> Masks:
        """The same budget; ``turnover`` of it goes to the dropped pairs of highest ``growth``."""
        open_ = {p: jnp.where(masks[p], s, -jnp.inf) for p, s in scores.items()}
        kept = self.masks(open_, left, turnover)
        forced = {
            p: jnp.where(
                kept[p],
                FORCED * np.float32(self.costs[p] if self.costs else 1),
                jnp.where(jnp.isfinite(scores[p]), g, -jnp.inf),
            )
            for p, g in growth.items()
        }
        return self.masks(forced, left)


NEEDS = {"activation": ("norms",), "taylor": ("grads",)}


def check_choice(density: float, score: Any) -> None:
    """Refuses a density or a score that does not exist."""
    require(
        0 <= density <= 1,
        f"`density` (={density}) must be between 0 (nodes never talk) and 1 (dense split); "
        "choose a share, such as 0.2",
    )
    require(
        not isinstance(score, str) or score in SCORES,
        f"`score` (={score!r}) must be one of {', '.join(SCORES)}; choose one of these",
    )
