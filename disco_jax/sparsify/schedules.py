"""How the density falls during training: pure functions of the update.

A schedule maps the share of the way ``t = (update - 1) / (steps - 1)`` to how much of ``1 -
density`` is still there: 1 is the dense split, 0 the final density ``s``. The density is ``s + (1 -
s) · left(t)``.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Schedule = Callable[[Float[Array, ""]], Float[Array, ""]]


def one_shot(t: Float[Array, ""]) -> Float[Array, ""]:
    """Dense before ``t = 1``, everything at once there.

    >>> [float(one_shot(t)) for t in (0.0, 0.9, 1.0)]
    [1.0, 1.0, 0.0]
    """
    return jnp.where(t < 1, 1.0, 0.0)


def constant(t: Float[Array, ""]) -> Float[Array, ""]:
    """The final density from the first update on; what is kept may still change.

    >>> float(constant(0.0))
    0.0
    """
    return jnp.zeros_like(t, float)


def linear(t: Float[Array, ""]) -> Float[Array, ""]:
    """``1 - t``.

    >>> [float(linear(t)) for t in (0.0, 0.25, 1.0, 2.0)]
    [1.0, 0.75, 0.0, 0.0]
    """
    return 1 - jnp.clip(t, 0.0, 1.0)


def cubic(t: Float[Array, ""]) -> Float[Array, ""]:
    """``(1 - t)³``: fast at first, slow at the end (Zhu & Gupta 2017, arXiv 1710.01878).

    >>> [round(float(cubic(t)), 3) for t in (0.0, 0.5, 1.0, 1.1)]
    [1.0, 0.125, 0.0, 0.0]
    """
    return linear(t) ** 3


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "cubic": cubic,
    "linear": linear,
    "one_shot": one_shot,
}
