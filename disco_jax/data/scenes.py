"""Scenes of handwritten digits: boxes and masks without a download, for configs on bare machines.

Each scene is made when asked for, from its number alone: digits of scikit-learn's set, enlarged,
at random places of a canvas with stripes of grey. The digits of a split are those of
``sources.digits``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from disco_jax.data.images import SPLITS, hold_out

SIZE = 64  # pixels of a scene's side
COUNTS = {"train": 2000, "validation": 200, "test": 400}
INK = 96  # grey level from which a pixel belongs to its digit


@dataclasses.dataclass(frozen=True)
class Scenes:
    """``{"image", "boxes", "classes", "mask"}``: digits 0 to 9, in the mask 1 to 10, 0 is ground.

    Boxes are corners as shares of the image, as tight around the ink as pixels allow.
    """

    digits: UInt8[np.ndarray, "n 8 8"]
    labels: Int[np.ndarray, "n"]
    count: int
    seed: int
    segments: bool = False
    num_classes: int = 10

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = range(self.count)[index]  # which knows where the set ends
        rng = np.random.default_rng((self.seed, number))
        stripes = rng.integers(0, 80, (1, SIZE)) + rng.integers(0, 60, (SIZE, 1))
        canvas, mask = stripes.astype(np.uint8), np.zeros((SIZE, SIZE), np.uint8)
        boxes, classes = [], []
        for _ in range(rng.integers(1, 5)):
            which, side = rng.integers(len(self.labels)), int(rng.integers(14, 33))
            digit = Image.fromarray(self.digits[which]).resize((side, side))
            ink = np.asarray(digit)
            top, left = rng.integers(0, SIZE - side + 1, 2)
            region = np.s_[top : top + side, left : left + side]
            if mask[region].any():  # digits do not cover each other
                continue
            shown = ink >= INK
            canvas[region] = np.maximum(canvas[region], ink)
            mask[region] = np.where(shown, self.labels[which] + 1, 0)
            rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
            boxes.append(
                (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
            )
            classes.append(self.labels[which])
        image = np.repeat(canvas[..., None], 3, -1)
        if self.segments:
            return {"image": image, "mask": mask}
        corners = np.asarray(boxes, np.float32).reshape(-1, 4) / SIZE
        return {"image": image, "boxes": corners, "classes": np.asarray(classes, np.int32)}


def scenes(_: str, split: str) -> Scenes:
    """The embedded set for detection."""
    from sklearn.datasets import load_digits

    found = load_digits()
    first_test = len(found.target) * 4 // 5
    index = np.arange(first_test, len(found.target))
    if split != "test":
        index = hold_out(first_test, split)
    images = np.round(found.images * (255 / 16)).astype(np.uint8)
    return Scenes(
        images[index], found.target[index].astype(np.int64), COUNTS[split], SPLITS.index(split)
    )


def segments(name: str, split: str) -> Scenes:
    """The embedded set for segmentation: 10 digits and the ground."""
    return dataclasses.replace(scenes(name, split), segments=True, num_classes=11)
