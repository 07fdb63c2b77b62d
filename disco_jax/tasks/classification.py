"""Image classification: smoothed cross-entropy and accuracy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Metrics = dict[str, Float[Array, ""]]


def loss(
    logits: Float[Array, "b classes"], labels: Int[Array, "b"], *, label_smoothing: float = 0.0
) -> Float[Array, ""]:
    """Mean cross-entropy against labels smoothed towards uniform (Szegedy et al. 2016).

    >>> round(float(loss(jnp.zeros((1, 2)), jnp.array([0]))), 4)
    0.6931
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def sums(
    logits: Float[Array, "b classes"], labels: Int[Array, "b"], weight: Float[Array, "b"]
) -> Metrics:
    """Sums over the examples of weight 1: ``correct``, ``loss`` and ``count``."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    correct = logits.argmax(-1) == labels
    return {
        "correct": jnp.sum(correct * weight),
        "loss": jnp.sum(each * weight),
        "count": jnp.sum(weight),
    }
