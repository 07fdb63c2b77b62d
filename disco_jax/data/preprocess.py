"""From an example's pixels and truth to what a model and its task take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from disco_jax.data import augment, joint, photos
from disco_jax.errors import require

Example = dict[str, Any]
Transform = Callable[[Example, int, np.random.Generator], Example]

# For each truth, the transforms that keep it right: others would leave it behind, or lack theirs.
SUITED = {
    "label": (*augment.TRANSFORMS, "distort", "mirror", "turn"),
    "boxes": ("distort", "expand", "mirror", "overlap_crop", "resize", "rgb", "turn"),
    "mask": ("distort", "fit", "mirror", "rgb", "scale_crop", "turn"),
    "target": ("degrade", "dihedral", "random_patch"),
}
# Those that make what has the size that a config says.
SIZED = {
    *("fit", "random_crop", "random_patch", "random_resized_crop", "resize"),
    *("resize_center_crop", "scale_crop"),
}


def transforms(scale: int = 1) -> dict[str, Transform]:
    """All transforms by name; ``scale`` is by how much a task enlarges its images."""

    def on_image(transform: augment.Transform) -> Transform:
        return lambda example, size, rng: {
            **example,
            "image": transform(example["image"], size, rng),
        }

    images = {name: on_image(transform) for name, transform in augment.TRANSFORMS.items()}
    return {**images, **joint.TRANSFORMS, **photos.make_transforms(scale)}


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Transforms by name, then normalisation: ``uint8[h, w, c] -> float32[size, size, c]``.

    Boxes are filled up to as many as a batch needs: ``boxes`` with zeros, ``classes`` with -1, what
    is true or false of them with False.

    Attributes:
      size: height and width of the result; 0 leaves them as the transforms do.
      transforms: keys of :func:`transforms`, in order.
      mean, std: for each channel, in units of the full range 0 to 1.
      scale: by how much the task enlarges its images.
      max_objects: boxes an example has room for.
    """

    size: int
    transforms: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: int = 1
    max_objects: int = 100

    def __post_init__(self) -> None:
        known = transforms(self.scale)
        for name in self.transforms:
            require(
                name in known,
                f"`transforms` contains {name!r}, but must be among {', '.join(sorted(known))}; "
                "choose from these",
            )
        sized = sorted(SIZED.intersection(self.transforms))
        require(
            self.size >= (1 if sized else 0),
            f"`data.size` (={self.size}) must be at least 1 pixel, or 0 (any) without transforms "
            f"that need it{' such as ' + ', '.join(sized) if sized else ''}; set a size",
        )

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        self._check_suited(example)
        known = transforms(self.scale)
        for name in self.transforms:
            example = known[name](example, self.size, rng)
        self._check(example["image"])
        found = {
            k: self._normalised(v) if k in ("image", "target") else v for k, v in example.items()
        }
        return self._filled(found) if "boxes" in found else found

    def _check_suited(self, example: Example) -> None:
        for truth in SUITED.keys() & example.keys():
            wrong = [name for name in self.transforms if name not in SUITED[truth]]
            require(
                not wrong,
                f"`transforms` contains {', '.join(map(repr, wrong))}, but of an example with "
                f"`{truth}` must be among {', '.join(SUITED[truth])}; choose from these",
            )

    def _check(self, image: UInt8[np.ndarray, "h w c"]) -> None:
        size = image.shape[:2] if self.size == 0 else (self.size, self.size)
        require(
            image.shape == (*size, len(self.mean)),
            f"`image` has shape {image.shape} after {self.transforms}, but must be "
            f"({', '.join(map(str, size))}, {len(self.mean)}); add a resize to the transforms, and "
            "give `mean` and `std` one entry for each channel",
        )

    def _normalised(self, image: UInt8[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w c"]:
        scaled = image.astype(np.float32) / 255 - np.asarray(self.mean, np.float32)
        return scaled / np.asarray(self.std, np.float32)

    def _filled(self, example: Example) -> Example:
        count = len(example["boxes"])
        require(
            count <= self.max_objects,
            f"`image` has {count} boxes, but `data.max_objects` (={self.max_objects}) at most; "
            "set it higher",
        )
        missing = self.max_objects - count
        flags = {k: np.pad(v, (0, missing)) for k, v in example.items() if v.dtype == bool}
        return {
            **example,
            **flags,
            "boxes": np.pad(example["boxes"].astype(np.float32), [(0, missing), (0, 0)]),
            "classes": np.pad(example["classes"], (0, missing), constant_values=-1),
        }


def training(config: Any) -> Preprocess:
    """What a config does to an example that is learned from."""
    return _make(config, config.data.train_transforms, config.data.size)


def evaluation(config: Any) -> Preprocess:
    """What a config does to an example that is evaluated, or served."""
    size = config.data.size if config.data.eval_size < 0 else config.data.eval_size
    return _make(config, config.data.eval_transforms, size)


def _make(config: Any, names: Sequence[str], size: int) -> Preprocess:
    data, scale = config.data, config.task.get("scale", 1)
    statistics = tuple(data.mean), tuple(data.std)
    return Preprocess(size, tuple(names), *statistics, scale, data.max_objects)
