"""How much each (node, channel) pair is worth: one pure function for each criterion.

All take the ``kernels`` that share an exchange, ``[..., c_in, c_out]``, with the columns of node
``d`` in its block of ``c_out / nodes``, and give ``float[node, channel]``. What else a score needs
it names: ``grads`` (as the kernels), ``norms`` (``‖x_c‖``, ``[channel]``), ``seed``.
"""

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


def taylor(kernels: Kernels, nodes: int, *, grads: Kernels) -> Float[Array, "node channel"]:
    """First-order effect of dropping the pair, ``|Σ w·∂L/∂w|`` (Molchanov et al. 2017, 2019).

    ``Σ w·∂L/∂w`` is the derivative of the loss by the pair's entry in the mask, over all its
    readers. ``sparse_exchange`` averages the score over batches.

    >>> kernel, grad = jnp.array([[3., 4.], [1., 1.]]), jnp.array([[1., -1.], [0., 2.]])
    >>> taylor([kernel], nodes=2, grads=[grad]).tolist()
    [[3.0, 0.0], [4.0, 2.0]]
    """
    return jnp.abs(_sum_groups([k * g for k, g in zip(kernels, grads, strict=True)], nodes))


def activation(
    kernels: Kernels, nodes: int, *, norms: Float[Array, "channel"]
) -> Float[Array, "node channel"]:
    """``‖x_c‖ · ‖w‖``: the pair's part in its reader's output (Wanda, Sun et al. 2024).

    ``norms`` are root mean squares of the channels; see ``calibrate.channel_norms``.

    >>> activation([jnp.array([[3., 4.], [0., 1.]])], nodes=2, norms=jnp.array([2., 1.])).tolist()
    [[6.0, 0.0], [8.0, 1.0]]
    """
    return l2(kernels, nodes) * norms


def random(kernels: Kernels, nodes: int, *, seed: int = 0) -> Float[Array, "node channel"]:
    """Uniform in [0, 1): the baseline that every criterion must beat.

    Constant for one seed and one set of kernel shapes, so that a mask does not change while its
    density falls.
    """
    key = jax.random.key(seed)
    for size in (size for kernel in kernels for size in kernel.shape):
        key = jax.random.fold_in(key, size)
    return jax.random.uniform(key, (nodes, kernels[0].shape[-2]))


def none(kernels: Kernels, nodes: int) -> Float[Array, "node channel"]:
    """Nothing is worth sending: nodes never talk, whatever the budget.

    >>> none([jnp.ones((1, 2))], nodes=2).tolist()
    [[-inf], [-inf]]
    """
    return jnp.full((nodes, kernels[0].shape[-2]), -jnp.inf)


SCORES: dict[str, Score] = {
    "activation": activation,
    "l1": l1,
    "l2": l2,
    "none": none,
    "random": random,
    "taylor": taylor,
}
