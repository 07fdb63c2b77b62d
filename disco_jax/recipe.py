"""How a config's ``sparse`` section learns what to send: what is done before and while training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from disco_jax import sparsify, wire
from disco_jax.errors import require
from disco_jax.sparsify import gates
from disco_jax.sparsify.quantise import WireDtype, wire_dtypes
from disco_jax.trace import exchanges
from disco_jax.train.step import Distillation


class Recipe:
    """The steps of learning masks, in order.

    Args:
      config: the ``sparse`` section of a config.
      model: what is trained, in place.
      images: shape of the input, for the costs.
      wire_dtype: what the model is to be frozen with; rounded to in training if the config says so.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: nnx.Module,
        images: jax.ShapeDtypeStruct,
        wire_dtype: WireDtype = None,
    ):
        self.config, self.model, self.wire_dtype = config, model, wire_dtype
        self.costs = sparsify.wire_costs(model, images)
        self.teacher: nnx.Module | None = None
        check(config)
        self.wires = wire_dtypes(list(exchanges(model)), wire_dtype)
        require(
            bool(self.wires) or not config.quantise,
            "`sparse.quantise` needs a `wire_dtype` to round to; set one, such as "
            "--config.wire_dtype=int8",
        )
        # Until `prepare` has seen images, all channels are alike: enough to restore what was saved.
        reading = exchanges(model)
        self.norms = {path: jnp.ones(e.channels) for path, e in reading.items()}
        self.scores = {path: jnp.zeros(e.mask.shape) for path, e in reading.items()}
        if config.regrow != "none":
            sparsify.allow_regrowth(model)
        # What exchanges and rules have to say against it is said now.
        jax.eval_shape(self.transform(optax.identity(), 1).init, nnx.state(model, nnx.Param))

    def prepare(self, images: Callable[[], Iterable[Any]]) -> None:
        """What happens to the trained dense model before the first mask is chosen."""
        if self.config.assignment != "none":
            sparsify.assign(self.model, next(iter(images())))
        if self._distills:
            self.teacher = nnx.clone(self.model)
        if self.config.score == "reconstruction" and not self.config.post_training:
            self.scores = sparsify.reconstruction_scores(self.model, images())
        if self._needs("activation"):
            self.norms = sparsify.channel_norms(self.model, images())
        if self.config.quantise:
            sparsify.quantise(self.model, np.concatenate(list(images())), self.wire_dtype)

    def shape(self) -> None:
        """Gives the model what :meth:`prepare` gives it, without its numbers: for a checkpoint."""
        if self.config.quantise:
            for path, exchange in exchanges(self.model).items():
                if path in self.wires:
                    blank = np.zeros((2, exchange.channels), np.float32)
                    needed = wire.calibrated(self.wires[path])
                    exchange.round_to(self.wires[path], blank if needed else None)

    def post_train(self, images: Callable[[], Iterable[Any]]) -> None:
        """Masks and weights from unlabelled images alone."""
        c = self.config
        sparsify.post_training(
            self.model,
            list(images()),
            c.density,
            budget=c.budget,
            costs=self.costs,
            rules=self._rules,
            **self._options,
        )

    def gate(self, inner: optax.GradientTransformation) -> optax.GradientTransformation:
        """Gives the model gates; returns the optimiser of weights and gates."""
        c = self.config
        gates.attach(self.model, c.gates, self.costs)
        gated = optax.adam(c.gate_learning_rate)
        return optax.multi_transform({"weights": inner, "gates": gated}, gates.is_gate)

    def penalty(self, model: nnx.Module) -> jax.Array:
        """What traffic beyond the budget costs, while gates are trained."""
        return gates.penalty(model, self.config.density)

    def close(self) -> None:
        """Makes masks of the gates."""
        gates.close(self.model, self.config.density)

    def transform(
        self, inner: optax.GradientTransformation, steps: int
    ) -> optax.GradientTransformation:
        """The optimiser that carries the masks; behind gates, or without masks, there is none."""
        c = self.config
        if self.gated or not exchanges(self.model):
            return inner
        return sparsify.sparse_exchange(
            inner,
            density=c.density,
            steps=steps,
            score=self.scores if c.score == "reconstruction" else c.score,
            schedule=c.schedule,
            every=c.every,
            budget=c.budget,
            costs=self.costs,
            rules=self._rules,
            regrow=c.regrow,
            turnover=c.turnover,
            lasso=c.lasso,
            norms=self.norms,
            **self._options,
        )

    def distillation(self) -> Distillation | None:
        """What is learned from the dense model."""
        if self.teacher is None:
            return None
        return Distillation(self.teacher, **self.config.distill.to_dict())

    @property
    def gated(self) -> bool:
        """Whether gates choose the masks."""
        return self.config.gates != "none"

    @property
    def _options(self) -> dict[str, Any]:
        c = self.config
        return {
            "by_cost": {"floor": c.floor, "charge": c.charge, "level": c.level},
            "per_link": {"links": np.asarray(c.links, np.float32)},
        }.get(c.budget, {})

    @property
    def _rules(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        return tuple((pattern, dict(override)) for pattern, override in self.config.rules)

    @property
    def _distills(self) -> bool:
        return self.config.distill.weight > 0 or self.config.distill.features > 0

    def _needs(self, score: str) -> bool:
        return score in (self.config.score, *(rule.get("score") for _, rule in self._rules))


def check(config: ConfigDict) -> None:
    """Refuses choices that do not exist, or not together, before anything is trained."""
    sparsify.check_choice(config.density, "l2")
    for name, allowed in (
        ("assignment", ("none", "local")),
        ("gates", ("none", *gates.KINDS)),
        ("score", sorted((*sparsify.SCORES, "reconstruction"))),
    ):
        require(
            config[name] in allowed,
            f"`sparse.{name}` (={config[name]!r}) must be one of {', '.join(allowed)}; choose one "
            "of these",
        )
    require(
        not (config.post_training and config.gates != "none"),
        "`sparse.post_training` and `sparse.gates` exclude each other: gates need training; set "
        "one of them only",
    )
    require(
        not (config.post_training and config.quantise),
        "`sparse.post_training` and `sparse.quantise` exclude each other: rounding is trained; set "
        "one of them only",
    )
    require(
        config.calibration_images >= 1,
        f"`sparse.calibration_images` (={config.calibration_images}) must be at least 1; a few "
        "hundred are usual",
    )
