"""Photographs for super-resolution, and how a small image to enlarge is made of each.

A source is random access: ``len(source)``, and ``source[i]`` is ``{"target": uint8[h, w, 3]}``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8

from disco_jax.data.images import SPLITS, decode, hold_out, image_files
from disco_jax.data.imresize import imresize
from disco_jax.errors import require

Example = dict[str, Any]
Transform = Callable[[Example, int, np.random.Generator], Example]

COLUMNS = {"train": (0.0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1.0)}  # of the samples


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures in memory, of any sizes."""

    images: tuple[UInt8[np.ndarray, "h w 3"], ...]
    num_classes: ClassVar[int] = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {"target": self.images[index]}


@dataclasses.dataclass(frozen=True)
class Photos:
    """Image files, read when asked for."""

    paths: tuple[Path, ...]
    num_classes: ClassVar[int] = 0

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        path = self.paths[index]
        return {"target": decode(path, str(path))}


def samples(_: str, split: str) -> Pictures:
    """The two photographs inside scikit-learn, 427x640, a temple and a flower.

    Both are cut at columns, so that no pixel is in two splits: 60 % to the left train, the next
    15 % validate, the rest tests.
    """
    from sklearn.datasets import load_sample_images

    images = load_sample_images().images
    cuts = [slice(*(round(share * x.shape[1]) for share in COLUMNS[split])) for x in images]
    return Pictures(tuple(x[:, cut] for x, cut in zip(images, cuts, strict=True)))


def photos(root: str, split: str) -> Photos:
    """``ROOT/{train,validation,test}/*``; or ``ROOT/*``, as Set5 comes, which is for tests alone.

    Without ``test`` the validation folder is the test split and a tenth of ``train`` validates;
    without ``validation`` the same tenth does.

    Raises:
      DiscoError: if there are no pictures for the split.
    """
    folders = {name: path for name in SPLITS if (path := Path(root) / name).is_dir()}
    folders = folders or {"test": Path(root)}
    if {"validation", "test"} <= folders.keys():
        return _pictures_in(Path(root) / split)
    if split == "test":
        return _pictures_in(folders.get("test", Path(root) / "validation"))
    every = _pictures_in(Path(root) / "train")
    return Photos(tuple(every.paths[i] for i in hold_out(len(every), split)))


def _pictures_in(folder: Path) -> Photos:
    found = image_files(folder.iterdir()) if folder.is_dir() else []
    require(
        bool(found),
        f"`data.source` needs pictures in {folder}, which has none; put them there, and those to "
        "train with in ROOT/train (what lies in ROOT itself is for tests alone)",
    )
    return Photos(tuple(found))


def make_transforms(scale: int) -> dict[str, Transform]:
    """Transforms of one example by name, for images to be enlarged ``scale`` times.

    Training has ``("random_patch", "dihedral", "degrade")``, evaluation ``("degrade",)``. Each
    takes the example, the height and width of a small patch, and the source of chance:

    * ``random_patch``: a square of ``size * scale`` pixels of the target, anywhere.
    * ``dihedral``: one of the eight flips and rotations of the target, all alike probable.
    * ``degrade``: the target cut to a multiple of ``scale`` at its lower and right borders, and
      ``"image"``, which is that resized by ``1 / scale`` as MATLAB's ``imresize`` does. What has
      no target, as in serving, is small already.

    Raises:
      DiscoError: if the scale is below 1; by the transforms, if a picture is too small, or is
        cut or turned after it was degraded.
    """
    require(scale >= 1, f"`scale` (={scale}) must be at least 1; enlarge by 2, 3 or 4")

    def random_patch(example: Example, size: int, rng: np.random.Generator) -> Example:
        target, side = _target(example), size * scale
        height, width = target.shape[:2]
        require(
            min(height, width) >= side,
            f"`target` has {height} x {width} pixels, but a patch needs {side} x {side} (`size` "
            f"{size} times `scale` {scale}); make patches smaller or leave out small pictures",
        )
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        return {**example, "target": target[top : top + side, left : left + side]}

    def degrade(example: Example, size: int, rng: np.random.Generator) -> Example:
        if "target" not in example:
            return example
        target = _target(example)
        height, width = (side // scale for side in target.shape[:2])
        require(
            min(height, width) >= 1,
            f"`target` has {target.shape[0]} x {target.shape[1]} pixels, but must have at least "
            f"`scale` (={scale}) on each side; leave out small pictures",
        )
        target = target[: height * scale, : width * scale]
        return {**example, "target": target, "image": imresize(target, (height, width))}

    return {"random_patch": random_patch, "dihedral": _dihedral, "degrade": degrade}


def _dihedral(example: Example, size: int, rng: np.random.Generator) -> Example:
    target = np.rot90(_target(example), int(rng.integers(4)))
    return {**example, "target": target[:, ::-1] if rng.random() < 0.5 else target}


def _target(example: Example) -> UInt8[np.ndarray, "h w 3"]:
    require(
        "image" not in example,
        "`transforms` go on after `degrade`, whose small image would no longer fit; put it last",
    )
    return example["target"]
