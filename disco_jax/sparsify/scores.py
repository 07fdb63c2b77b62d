"""How much each (node, channel) pair is worth: one pure function for each criterion."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Kernels = Sequence[Float[Array, "... c_in c_out"]]
Score = Callable[..., Float[Array, "node channel"]]


def _sum_groups(values: Kernels, nodes: int) -> Float[Array, "node channel"]:
    """Sums ``[..., c_in, c_out]`` over everything but the input channel and the output's owner."""

    def one(value: Array) -> Array:
        c_in = value.shape[-2]
        return jnp.einsum(
            "kcno->nc", jnp.reshape(value, (-1, c_in, nodes, value.shape[-1] // nodes))
        )

    return sum((one(v) for v in values[1:]), one(values[0]))


def l2(kernels: Kernels, nodes: int) -> Float[Array, "node channel"]:
    """Group magnitude, ``sqrt(Σ w²)`` over the weights of node ``d`` that read channel ``c``.

    Summed over all ``kernels`` that share the exchange (Li et al. 2017, Wen et al. 2016).

    >>> l2([jnp.array([[3., 4.], [0., 1.]])], nodes=2).tolist()
    [[3.0, 0.0], [4.0, 1.0]]
    """
    return jnp.sqrt(_sum_groups([jnp.square(k) for k in kernels], nodes))


def l1(kernels: Kernels, nodes: int) -> Float[Array, "node channel"]:
    """Group magnitude, ``Σ |w|`` (Li et al. 2017).

    >>> l1([jnp.array([[3., -4.], [0., 1.]])], nodes=2).tolist()
    [[3.0, 0.0], [4.0, 1.0]]
    """
    return _sum_groups([jnp.abs(k) for k in kernels], nodes)


def random(kernels: Kernels, nodes: int, *, seed: int = 0) -> Float[Array, "node channel"]:
    """Uniform in [0, 1): the baseline that every criterion must beat.

    Constant for one shape and seed, so that a mask does not change while its density falls.
    """
    channels = kernels[0].shape[-2]
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), channels), (nodes, channels))


SCORES: dict[str, Score] = {"l1": l1, "l2": l2, "random": random}
