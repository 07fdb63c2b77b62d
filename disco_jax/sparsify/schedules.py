"""How the density falls during training: pure functions of the step."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def one_shot(density: float, steps: int) -> Schedule:
    """Everything at once: 1 before step 0, ``density`` from then on.

    >>> float(one_shot(0.25, steps=10)(0))
    0.25
    """
    return lambda step: jnp.full((), density)


def cubic(density: float, steps: int) -> Schedule:
    """``s + (1 - s)(1 - t/T)³``: fast at first, slow at the end (Zhu & Gupta 2017).

    >>> [round(float(cubic(0.2, steps=10)(t)), 3) for t in (0, 5, 10, 11)]
    [1.0, 0.3, 0.2, 0.2]
    """

    def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
        left = 1 - jnp.clip(step / max(steps, 1), 0, 1)
        return density + (1 - density) * left**3

    return schedule


SCHEDULES: dict[str, Callable[[float, int], Schedule]] = {"one_shot": one_shot, "cubic": cubic}
