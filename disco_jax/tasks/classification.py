"""Image classification: smoothed cross-entropy and accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from disco_jax.tasks import distillation
from disco_jax.tasks.task import Batch, Measures

Logits = Float[Array, "b classes"]


@dataclasses.dataclass(frozen=True)
class Classification:
    """One class for each image; batches have ``"label"``, ``int[b]``.

    Attributes:
      label_smoothing: share of the target that all classes have alike (Szegedy et al. 2016).
    """

    label_smoothing: float = 0.0
    metric = "accuracy"
    unit = "%"

    def loss(self, outputs: Logits, batch: Batch) -> Float[Array, ""]:
        """Mean cross-entropy against smoothed labels.

        >>> round(float(Classification().loss(jnp.zeros((1, 2)), {"label": jnp.array([0])})), 4)
        0.6931
        """
        logits = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
        labels = jax.nn.one_hot(batch["label"], logits.shape[-1])
        targets = optax.smooth_labels(labels, self.label_smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean()

    def imitation(self, outputs: Logits, teacher: Logits, temperature: float) -> Float[Array, ""]:
        """The teacher's soft labels."""
        return distillation.soft_labels(outputs, teacher, temperature)

    def measure(self, outputs: Logits, batch: Batch) -> Measures:
        """Sums over the examples of weight 1: ``correct``, ``loss`` and ``count``."""
        labels, weight = batch["label"], batch["weight"]
        logits = outputs.astype(jnp.float32)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = outputs.argmax(-1) == labels
        return {
            "correct": jnp.sum(correct * weight),
            "loss": jnp.sum(each * weight),
            "count": jnp.sum(weight),
        }

    def answer(self, outputs: Logits) -> Measures:
        """The best ``class`` and its probability, its ``score``."""
        scores = jax.nn.softmax(outputs.astype(jnp.float32))
        return {"class": scores.argmax(-1), "score": scores.max(-1)}

    def said(self, answer: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """``{"class", "score"}``."""
        return {"class": int(answer["class"]), "score": float(answer["score"])}

    def summary(self, found: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """``accuracy`` and mean ``loss``."""
        total = {k: sum(float(part[k]) for part in found) for k in ("correct", "loss", "count")}
        accuracy = total["correct"] / total["count"]
        return {"accuracy": accuracy, "loss": total["loss"] / total["count"]}
