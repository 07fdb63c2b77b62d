"""Bicubic resizing as MATLAB's ``imresize``, by which super-resolution makes its small images."""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import Float, Shaped
from scipy import sparse

from disco_jax.errors import require


def imresize(
    image: Shaped[np.ndarray, "h w c"], scale: float | tuple[int, int]
) -> Shaped[np.ndarray, "h2 w2 c"]:
    """Bicubic, with antialiasing where it shrinks; borders are mirrored.

    Computed in ``float64``, first along the axis that shrinks most. Integers are rounded, halves
    up, and clipped after each axis, which is what MATLAB does.

    Args:
      image: ``uint8``, or of a float type; the result has the same.
      scale: factor, of which the size is ``ceil(scale * size)``; or height and width.

    Raises:
      DiscoError: for an image of another type or rank, or a scale or size that is not positive.

    >>> imresize(np.array([[[10.0], [6.0]]]), (1, 3)).round(4).ravel().tolist()  # as MATLAB has it
    [10.2778, 8.0, 5.7222]
    """
    integer = image.dtype == np.uint8
    require(
        image.ndim == 3 and (integer or np.issubdtype(image.dtype, np.floating)),
        f"`image` is {image.dtype}{list(image.shape)}, but must be uint8 or float [h, w, c]; "
        "convert it",
    )
    sizes, scales = _sizes_and_scales(image.shape[:2], scale)
    found = image
    for axis in np.argsort(scales, kind="stable"):
        found = _along(found, axis, weights(image.shape[axis], sizes[axis], scales[axis]))
        if integer:
            found = np.floor(np.clip(found, 0, 255) + 0.5)
    return found.astype(image.dtype)


def _sizes_and_scales(
    shape: tuple[int, ...], scale: float | tuple[int, int]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    positive = all(s > 0 for s in scale) if isinstance(scale, tuple) else scale > 0
    require(
        positive and min(shape) > 0,
        f"`scale` (={scale}) and both sides of the image (={shape}) must be positive; give a "
        "factor, or height and width in pixels",
    )
    if isinstance(scale, tuple):
        return scale, tuple(new / old for new, old in zip(scale, shape, strict=True))
    return tuple(math.ceil(scale * old) for old in shape), (scale,) * len(shape)


@functools.lru_cache(maxsize=256)
def weights(size: int, new_size: int, scale: float) -> sparse.csr_array:
    """The sparse matrix ``f64[new_size, size]`` that resizes one axis; each row sums to 1.

    Pixel ``j`` of the result lies at ``(j + 1/2) / scale - 1/2`` and sees the kernel, stretched
    by ``1 / scale`` where that shrinks the image. Beyond a border follows the image mirrored,
    with the outermost pixel twice.

    >>> weights(4, 2, 0.5).toarray()[0].tolist()
    [0.546875, 0.3984375, 0.1015625, -0.046875]
    """
    narrow = min(scale, 1.0)
    centres = (np.arange(new_size) + 0.5) / scale - 0.5
    reach = 2 / narrow
    first = np.floor(centres - reach).astype(np.int64)
    columns = first[:, None] + np.arange(math.ceil(2 * reach) + 2)
    values = cubic(narrow * (centres[:, None] - columns))
    values /= values.sum(axis=1, keepdims=True)
    rows = np.broadcast_to(np.arange(new_size)[:, None], columns.shape)
    mirrored = np.minimum(columns % (2 * size), -(columns + 1) % (2 * size))
    entries = values.ravel(), (rows.ravel(), mirrored.ravel())
    return sparse.coo_array(entries, shape=(new_size, size)).tocsr()  # adds up what meets


def cubic(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The cubic convolution kernel with ``a = -1/2`` (Keys 1981, doi 10.1109/TASSP.1981.1163711).

    ``3/2·|x|³ - 5/2·|x|² + 1`` up to 1, ``-1/2·|x|³ + 5/2·|x|² - 4·|x| + 2`` up to 2, then 0.

    >>> cubic(np.array([0.0, 0.5, 1.5, 3.0])).tolist()
    [1.0, 0.5625, -0.0625, 0.0]
    """
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _along(
    image: Shaped[np.ndarray, "h w c"], axis: int, matrix: sparse.csr_array
) -> Float[np.ndarray, "h2 w2 c"]:
    front = np.moveaxis(image, axis, 0)
    product = matrix @ front.reshape(len(front), -1).astype(np.float64)
    return np.moveaxis(product.reshape(-1, *front.shape[1:]), 0, axis)
