"""Non-maximum suppression: of boxes that overlap and say the same, the surest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from disco_jax.tasks.boxes import overlap


def nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, "n"],
    classes: Int[Array, "n"],
    threshold: float,
    limit: int,
) -> Int[Array, "limit"]:
    """Greedy, and among boxes of one class: takes the best, strikes what overlaps it by more.

    ``limit`` rounds over all boxes: it needs no table of their overlaps, and gives what the first
    ``limit`` of a suppression to the end would be.

    Args:
      boxes: corners.
      scores: those of 0 or less are never taken.
      classes: any numbers.
      threshold: the largest intersection over union of two boxes of one class that both stay.
      limit: how many to take.

    Returns:
      Indices of the boxes by falling score; of equal ones the first comes first; then -1.

    >>> boxes = jnp.array([[0., 0., 1., 1.], [0., 0., 1., .9], [0., 0., 1., .8]])
    >>> nms(boxes, jnp.array([.5, .9, .7]), jnp.array([0, 0, 1]), 0.5, 3).tolist()
    [1, 2, -1]
    """

    def take(i: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        left, taken = state
        best = jnp.argmax(left)
        taken = taken.at[i].set(jnp.where(left[best] > 0, best, -1))
        struck = (classes == classes[best]) & (overlap(boxes, boxes[best]) > threshold)
        return jnp.where(struck, 0, left).at[best].set(0), taken  # an empty box misses even itself

    start = jnp.where(scores > 0, scores, 0), jnp.full(limit, -1, jnp.int32)
    return jax.lax.fori_loop(0, limit, take, start)[1]
