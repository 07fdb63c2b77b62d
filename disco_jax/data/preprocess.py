"""From an image's pixels to a model's input."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from disco_jax.data.augment import TRANSFORMS
from disco_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Image transforms by name, then normalisation: ``uint8[h, w, c] -> float32[size, size, c]``.

    Attributes:
      size: height and width of the result.
      transforms: keys of ``TRANSFORMS``, in order.
      mean, std: for each channel, in units of the full range 0 to 1.
    """

    size: int
    transforms: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in self.transforms:
            require(
                name in TRANSFORMS,
                f"`transforms` contains {name!r}, but must be among {', '.join(TRANSFORMS)}; "
                "choose from these",
            )
        require(self.size >= 1, f"`data.size` (={self.size}) must be at least 1 pixel")

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image = example["image"]
        for name in self.transforms:
            image = TRANSFORMS[name](image, self.size, rng)
        require(
            image.shape == (self.size, self.size, len(self.mean)),
            f"`image` has shape {image.shape} after {self.transforms}, but must be "
            f"({self.size}, {self.size}, {len(self.mean)}); add a resize to the transforms, and "
            "give `mean` and `std` one entry for each channel",
        )
        scaled = image.astype(np.float32) / 255 - np.asarray(self.mean, np.float32)
        return {**example, "image": scaled / np.asarray(self.std, np.float32)}
