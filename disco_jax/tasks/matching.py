"""Which object a default box answers for, and what it should say of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from disco_jax.tasks.boxes import encode, overlap


def assign(
    objects: Float[Array, "m 4"],
    real: Bool[Array, "m"],
    defaults: Float[Array, "n 4"],
    threshold: float = 0.5,
) -> Int[Array, "n"]:
    """The object of each default box, -1 for none (Liu et al. 2016, section 2.2).

    A default box takes the object that it overlaps most, if by ``threshold`` or more. Besides,
    every object gets the default box that overlaps it most, by however little; the last of
    several objects which want the same one.

    Args:
      objects: boxes, at least one.
      real: False for rows that only fill up.
      defaults: see :func:`disco_jax.tasks.boxes.default_boxes`.

    >>> defaults = jnp.array([[0., 0., 1., 1.], [0., 0., .5, 1.], [.5, 0., 1., 1.]])
    >>> objects = jnp.array([[0., 0., .3, .3], [0., 0., 1., .9]])
    >>> assign(objects, jnp.array([True, True]), defaults).tolist()
    [1, 0, -1]
    """
    shares = jnp.where(real[:, None], overlap(objects[:, None], defaults), -1)
    liked = jnp.where(shares.max(0) >= threshold, shares.argmax(0), -1)
    best = jnp.where(real, shares.argmax(1), len(defaults))  # nowhere: out of bounds is dropped
    ranks = jnp.arange(len(objects), dtype=liked.dtype)
    wanted = jnp.full_like(liked, -1).at[best].max(ranks, mode="drop")
    return jnp.where(wanted >= 0, wanted, liked)


def targets(
    objects: Float[Array, "b m 4"],
    classes: Int[Array, "b m"],
    defaults: Float[Array, "n 4"],
    threshold: float = 0.5,
) -> tuple[Int[Array, "b n"], Float[Array, "b n 4"]]:
    """What the default boxes should answer: their classes, 0 for background, and their codes.

    Args:
      objects: boxes; rows of class -1 only fill up.
      classes: from 0, without the background.
      defaults, threshold: see :func:`assign`.

    Returns:
      Classes with the background's first; codes, which mean nothing where that is the class.
    """
    each = jax.vmap(assign, (0, 0, None, None))
    taken = each(objects, classes >= 0, defaults, threshold)
    place = jnp.maximum(taken, 0)
    labels = jnp.where(taken >= 0, 1 + jnp.take_along_axis(classes, place, 1), 0)
    return labels, encode(jnp.take_along_axis(objects, place[..., None], 1), defaults)
