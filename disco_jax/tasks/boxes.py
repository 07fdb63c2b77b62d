"""Boxes: default boxes, overlap, and the code of one box relative to another.

Boxes are ``[..., 4]`` with the corners ``(x1, y1, x2, y2)``, as shares of the image's width and
height.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from disco_jax.errors import require

VARIANCES = (0.1, 0.1, 0.2, 0.2)  # of centres and sizes, which their codes are divided by
Boxes = Float[Array | np.ndarray, "... 4"]


def default_boxes(
    maps: Sequence[tuple[int, int]],
    scales: Sequence[float],
    ratios: Sequence[Sequence[float]],
    steps: Sequence[float] | None = None,
) -> Float[np.ndarray, "boxes 4"]:
    """The boxes that a detector starts from (Liu et al. 2016, arXiv 1512.02325, section 2.2).

    Every position of map ``k`` has a square of side ``s_k``, one of side ``√(s_k · s_k+1)``, and
    for each ratio ``a`` boxes of ``s_k · √a`` by ``s_k / √a`` and the other way round, in this
    order; the boxes are ordered by map, row, column.

    Args:
      maps: height and width of each map.
      scales: ``s_k`` for each map, and one more, as shares of the image.
      ratios: for each map its aspect ratios beside 1.
      steps: for each map the share of the image from one position to the next; None: 1 over the
        size of the map.

    >>> default_boxes([(1, 1)], [0.5, 0.5], [(4,)]).tolist()[2]
    [0.0, 0.375, 1.0, 0.625]
    """
    require(
        len(scales) == len(maps) + 1 and len(ratios) == len(maps),
        f"`scales` (={len(scales)} of them) must be one more than the {len(maps)} maps, and "
        f"`ratios` (={len(ratios)}) as many as these; give every map its own",
    )
    found = []
    for k, (height, width) in enumerate(maps):
        size, next_size = scales[k], scales[k + 1]
        sides = [(size, size), (np.sqrt(size * next_size),) * 2]
        for ratio in ratios[k]:
            long, short = size * np.sqrt(ratio), size / np.sqrt(ratio)
            sides += [(long, short), (short, long)]
        step = (1 / width, 1 / height) if steps is None else (steps[k], steps[k])
        places = itertools.product(range(height), range(width), np.clip(sides, 0, 1))
        found += [((x + 0.5) * step[0], (y + 0.5) * step[1], w, h) for y, x, (w, h) in places]
    centres, sizes = np.split(np.asarray(found, np.float32), 2, axis=1)
    return np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1)


def area(boxes: Boxes) -> Float[Array, "..."]:
    """Of boxes that are inside out: 0."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def overlap(a: Boxes, b: Boxes) -> Float[Array, "..."]:
    """Intersection over union of boxes whose leading axes broadcast; 0 where both are empty.

    >>> float(overlap(jnp.array([0., 0., 2., 1.]), jnp.array([1., 0., 3., 1.]))).__round__(4)
    0.3333
    """
    corners = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    common = area(jnp.concatenate(corners, -1))
    union = area(a) + area(b) - common
    return jnp.where(union > 0, common / jnp.where(union > 0, union, 1), 0)


def encode(boxes: Boxes, defaults: Boxes) -> Float[Array, "... 4"]:
    """Centre relative to the default box, logarithm of the size, both divided by their variance."""
    (centre, size), (origin, unit) = _centred(boxes), _centred(defaults)
    size = jnp.maximum(size, 1e-6)  # boxes that only fill up a batch
    codes = jnp.concatenate([(centre - origin) / unit, jnp.log(size / unit)], -1)
    return codes / jnp.asarray(VARIANCES, codes.dtype)


def decode(codes: Boxes, defaults: Boxes) -> Float[Array, "... 4"]:
    """The inverse of :func:`encode`."""
    origin, unit = _centred(defaults)
    shift, stretch = jnp.split(codes * jnp.asarray(VARIANCES, codes.dtype), 2, -1)
    centre, size = origin + shift * unit, unit * jnp.exp(stretch)
    return jnp.concatenate([centre - size / 2, centre + size / 2], -1)


def _centred(boxes: Boxes) -> tuple[Array, Array]:
    low, high = jnp.split(jnp.asarray(boxes), 2, -1)
    return (low + high) / 2, high - low
