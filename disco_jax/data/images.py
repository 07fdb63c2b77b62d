"""Examples with random access, and image files as arrays: what all readers of data sets share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, UnidentifiedImageError

from disco_jax.errors import DiscoError, require

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.1  # share of the training images used for validation where a set has no such split


class Source(Protocol):
    """Random access to examples: dictionaries with the pixels and what the task's truth is.

    ``num_classes`` is 0 where there are no classes.
    """

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images in memory."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, "n"]
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def subset(self, index: np.ndarray) -> ArraySource:
        return ArraySource(self.images[index], self.labels[index], self.num_classes)


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Image files, read when asked for."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    num_classes: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {"image": decode(path, str(path)), "label": self.labels[index]}

    def subset(self, index: np.ndarray) -> FileSource:
        return FileSource(
            tuple(self.paths[i] for i in index),
            tuple(self.labels[i] for i in index),
            self.num_classes,
        )


@dataclasses.dataclass(frozen=True)
class Repeated:
    """Every example ``times`` over: an epoch of patches takes many of each photograph."""

    source: Source
    times: int

    def __post_init__(self) -> None:
        require(self.times >= 1, f"`data.repeat` (={self.times}) must be at least 1; set it to 1")

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    def __len__(self) -> int:
        return self.times * len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[range(len(self))[index] % len(self.source)]


def decode(
    file: Path | BinaryIO, name: str, channels: int = 3
) -> UInt8[np.ndarray, "h w channels"]:
    """The pixels of an image file in colour, or in grey if there is 1 channel.

    Raises:
      DiscoError: if it is missing, damaged, no image, or of absurd size; it has the ``name``.
    """
    try:
        image = np.asarray(Image.open(file).convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no format that Pillow knows" if unknown else " ".join(str(error).split())
        raise DiscoError(
            f"`image` {name} cannot be read ({reason}); replace or remove the file"
        ) from None
    return image.reshape(*image.shape[:2], -1)


def image_files(found: Iterable[Path]) -> list[Path]:
    """Those whose names end as images' do, sorted."""
    suffixes = set(Image.registered_extensions())
    return sorted(path for path in found if path.suffix.lower() in suffixes)


def hold_out(count: int, split: str) -> Int[np.ndarray, "m"]:
    """Indices of ``train`` or ``validation`` among training images: a fixed random tenth."""
    require(
        count >= 10,
        f"`data.source` has {count} training images, but needs at least 10, a tenth of which "
        "validates; add images",
    )
    order = np.random.default_rng(0).permutation(count)
    held = round(count * HELD_OUT)
    return np.sort(order[:held] if split == "validation" else order[held:])
