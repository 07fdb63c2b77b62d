"""Learning from a teacher: its soft answers, and what it sees on the way."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def soft_labels(
    logits: Float[Array, "b classes"], teacher: Float[Array, "b classes"], temperature: float
) -> Float[Array, ""]:
    """``T² · KL(softmax(teacher / T) ‖ softmax(logits / T))``, batch mean (Hinton et al. 2015).

    >>> float(soft_labels(jnp.array([[1., 0.]]), jnp.array([[1., 0.]]), 4.0))
    0.0
    """
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    student = jax.nn.log_softmax(logits.astype(wide) / temperature)
    target = jax.nn.log_softmax(teacher.astype(wide) / temperature)
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(student, target).mean()


def features(
    student: Sequence[Float[Array, "b ..."]], teacher: Sequence[Float[Array, "b ..."]]
) -> Float[Array, ""]:
    """Squared difference as a share of the teacher's energy, mean over the tensors.

    FitNets (Romero et al. 2015) without a regressor: both networks have the same channels.

    >>> float(features([jnp.array([[1., 0.]])], [jnp.array([[2., 0.]])]))
    0.25
    """
    shares = [
        jnp.sum(jnp.square(s - t)) / jnp.maximum(jnp.sum(jnp.square(t)), 1e-12)
        for s, t in zip(student, teacher, strict=True)
    ]
    return sum(shares, jnp.zeros(())) / max(len(shares), 1)
