"""Transforms of one image, ``uint8[h, w, c] -> uint8[h, w, c]``, chance by a given generator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, "h w c"]
Transform = Callable[[Pixels, int, np.random.Generator], Pixels]


def _resample(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Resizes to (height, width), bilinear with antialiasing."""
    if image.shape[:2] == size:
        return image
    squeezed = image[..., 0] if image.shape[-1] == 1 else image
    resized = Image.fromarray(squeezed).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(*size, image.shape[-1])


def resize(image: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """To ``size`` x ``size``, whatever the shape was."""
    return _resample(image, (size, size))


def resize_center_crop(image: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """The shorter side to ``size / 0.875``, then the centre: how ImageNet is evaluated."""
    scale = round(size / 0.875) / min(image.shape[:2])
    height, width = (max(size, round(side * scale)) for side in image.shape[:2])
    image = _resample(image, (height, width))
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def random_resized_crop(image: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """A crop of 8 to 100 % of the area and aspect 3/4 to 4/3, resized (Szegedy et al. 2015)."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return _resample(image[top : top + h, left : left + w], (size, size))
    return resize_center_crop(image, size, rng)


def random_crop(image: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """Resized to ``size``, padded by an eighth with zeros on each side, cut at random (CIFAR)."""
    image = _resample(image, (size, size))
    border = max(1, size // 8)
    image = np.pad(image, ((border, border), (border, border), (0, 0)))
    top, left = rng.integers(2 * border + 1, size=2)
    return image[top : top + size, left : left + size]


def flip(image: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """Left and right exchanged in half of the cases."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def rgb(image: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """A grey image three times over; a colour image as it is."""
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


TRANSFORMS: dict[str, Transform] = {
    "flip": flip,
    "random_crop": random_crop,
    "random_resized_crop": random_resized_crop,
    "resize": resize,
    "resize_center_crop": resize_center_crop,
    "rgb": rgb,
}
