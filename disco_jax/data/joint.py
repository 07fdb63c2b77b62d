"""Transforms of an example whose truth has places: boxes, or a class for each pixel.

``(example, size, rng) -> example``; pixels ``uint8[h, w, c]``, boxes corners as shares of the
sides, so that resizing an image leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

Example = dict[str, Any]
Transform = Callable[[Example, int, np.random.Generator], Example]
IGNORED = 255  # in masks: counts nowhere
GREY = 124  # of what is filled up in images
RESAMPLING = {"image": Image.Resampling.BILINEAR, "mask": Image.Resampling.NEAREST}
PIXELWISE = tuple(RESAMPLING)
LEAST_OVERLAPS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
PER_OBJECT = ("boxes", "classes", "difficult", "crowd")


def mirror(example: Example, size: int, rng: np.random.Generator) -> Example:
    """Left and right exchanged in half of the cases."""
    if rng.random() < 0.5:
        return example
    found = {**example, "image": example["image"][:, ::-1]}
    if "mask" in example:
        found["mask"] = example["mask"][:, ::-1]
    if "boxes" in example:
        x1, y1, x2, y2 = example["boxes"].T
        found["boxes"] = np.stack([1 - x2, y1, 1 - x1, y2], 1)
    return found


def turn(example: Example, size: int, rng: np.random.Generator) -> Example:
    """A quarter, half, three quarters of a turn or none: pictures from above have no upside."""
    times = int(rng.integers(4))
    found = {k: np.rot90(v, times) if k in PIXELWISE else v for k, v in example.items()}
    if "boxes" in example:
        for _ in range(times):
            x1, y1, x2, y2 = found["boxes"].T
            found["boxes"] = np.stack([y1, 1 - x2, y2, 1 - x1], 1)
    return found


def distort(example: Example, size: int, rng: np.random.Generator) -> Example:
    """Brightness, contrast, saturation and hue, each in half of the cases (SSD, section 2.2).

    Grey images have no saturation and hue.
    """
    image, grey = _picture(example["image"]), example["image"].shape[-1] == 1
    changes = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for change in rng.permutation(3):
        if rng.random() < 0.5:
            low, high = (0.875, 1.125) if change == 0 else (0.5, 1.5)
            image = changes[change](image).enhance(rng.uniform(low, high))
    if rng.random() < 0.5 and not grey:
        hue, *rest = image.convert("HSV").split()
        turned = (np.asarray(hue, int) + rng.integers(-13, 14)) % 256  # of 256: 18 degrees
        image = Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), *rest)).convert("RGB")
    return {**example, "image": np.asarray(image).reshape(example["image"].shape)}


def expand(example: Example, size: int, rng: np.random.Generator) -> Example:
    """In half of the cases put somewhere on a grey canvas of up to four times the sides (SSD)."""
    if rng.random() < 0.5:
        return example
    image, ratio = example["image"], rng.uniform(1, 4)
    height, width, channels = image.shape
    tall, wide = int(height * ratio), int(width * ratio)
    canvas = np.full((tall, wide, channels), GREY, np.uint8)
    top, left = int(rng.integers(tall - height + 1)), int(rng.integers(wide - width + 1))
    canvas[top : top + height, left : left + width] = image
    sides, shift, new = (
        np.asarray(pair * 2, np.float32) for pair in ([width, height], [left, top], [wide, tall])
    )
    boxes = (example["boxes"] * sides + shift) / new
    return {**example, "image": canvas, "boxes": boxes.astype(np.float32)}


def overlap_crop(example: Example, size: int, rng: np.random.Generator) -> Example:
    """A patch that overlaps an object by a chosen least amount, or the whole image (SSD).

    Objects whose centre is in the patch stay, cut at its border.
    """
    image, boxes = example["image"], example["boxes"]
    height, width = image.shape[:2]
    least = LEAST_OVERLAPS[rng.integers(len(LEAST_OVERLAPS))]
    if least is None or not len(boxes):
        return example
    for _ in range(50):
        w, h = rng.uniform(0.3, 1, 2)
        if not 0.5 <= (w * width) / (h * height) <= 2:
            continue
        left, top = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
        x1, y1, x2, y2 = (
            *(int(left * width), int(top * height)),
            *(int((left + w) * width), int((top + h) * height)),
        )
        patch = np.asarray([x1 / width, y1 / height, x2 / width, y2 / height], np.float32)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((centres > patch[:2]) & (centres < patch[2:])).all(1)
        if inside.any() and _overlap(boxes[inside], patch).max() >= least:
            cut = np.clip(boxes[inside], np.tile(patch[:2], 2), np.tile(patch[2:], 2))
            found = {k: v[inside] for k, v in example.items() if k in PER_OBJECT}
            found["boxes"] = (cut - np.tile(patch[:2], 2)) / np.tile(patch[2:] - patch[:2], 2)
            return {**example, **found, "image": image[y1:y2, x1:x2]}
    return example


def _overlap(boxes: np.ndarray, patch: np.ndarray) -> np.ndarray:
    common = np.clip(
        np.minimum(boxes[:, 2:], patch[2:]) - np.maximum(boxes[:, :2], patch[:2]), 0, None
    ).prod(1)
    return common / (
        (boxes[:, 2:] - boxes[:, :2]).prod(1) + (patch[2:] - patch[:2]).prod() - common
    )


def scale_crop(example: Example, size: int, rng: np.random.Generator) -> Example:
    """Resized by half to twice, filled up if it is small then, and a random square cut out."""
    scaled = _resized(example, rng.uniform(0.5, 2.0))
    filled = _filled(scaled, size)
    height, width = filled["image"].shape[:2]
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    region = np.s_[top : top + size, left : left + size]
    return {k: v[region] if k in PIXELWISE else v for k, v in filled.items()}


def fit(example: Example, size: int, rng: np.random.Generator) -> Example:
    """The longer side to ``size`` if it is longer; filled up at the right and below to a square.

    ``extent``, ``int32[2]``, says how many rows and columns are of the image.
    """
    factor = min(1.0, size / max(example["image"].shape[:2]))
    found = _resized(example, factor) if factor < 1 else example
    return {**_filled(found, size), "extent": np.asarray(found["image"].shape[:2], np.int32)}


def _resized(example: Example, factor: float) -> Example:
    height, width = (max(1, round(side * factor)) for side in example["image"].shape[:2])

    def resized(name: str) -> np.ndarray:
        scaled = _picture(example[name]).resize((width, height), RESAMPLING[name])
        return np.asarray(scaled).reshape(height, width, *example[name].shape[2:])

    return {**example, **{name: resized(name) for name in PIXELWISE if name in example}}


def _picture(pixels: np.ndarray) -> Image.Image:
    """A single channel is no axis to Pillow."""
    grey = pixels.ndim == 3 and pixels.shape[-1] == 1
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels))


def _filled(example: Example, size: int) -> Example:
    below, right = (max(0, size - side) for side in example["image"].shape[:2])
    edge = [(0, below), (0, right)]
    found = {**example, "image": np.pad(example["image"], [*edge, (0, 0)], constant_values=GREY)}
    if "mask" in example:  # not where an image is served
        found["mask"] = np.pad(example["mask"], edge, constant_values=IGNORED)
    return found


TRANSFORMS: dict[str, Transform] = {
    "distort": distort,
    "expand": expand,
    "fit": fit,
    "mirror": mirror,
    "overlap_crop": overlap_crop,
    "scale_crop": scale_crop,
    "turn": turn,
}
