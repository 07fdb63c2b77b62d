"""Batches for training and evaluation, through grain."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from disco_jax.data.augment import TRANSFORMS
from disco_jax.data.sources import Source
from disco_jax.errors import require

Batch = dict[str, np.ndarray]


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


def training_batches(
    source: Source, preprocess: Preprocess, batch_size: int, *, seed: int, threads: int = 4
) -> grain.DatasetIterator:
    """An endless iterator over shuffled, augmented batches; every epoch has its own order.

    Order and augmentation follow from ``seed`` and the position alone, so that the iterator
    continues exactly after ``set_state``.

    Raises:
      DiscoError: if a batch is larger than the data set.
    """
    require(
        1 <= batch_size <= len(source),
        f"`batch_size` (={batch_size}) must be between 1 and the {len(source)} training images; "
        "choose a smaller batch",
    )
    dataset = (
        grain.MapDataset.source(source)  # type: ignore[arg-type]
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(preprocess)
        .batch(batch_size)
    )
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * batch_size)
    return iter(dataset.to_iter_dataset(options))


def evaluation_batches(source: Source, preprocess: Preprocess, batch_size: int) -> Iterator[Batch]:
    """Every image once, in order; the last batch is filled up with entries of ``weight`` 0."""
    rng = np.random.default_rng(0)
    for start in range(0, len(source), batch_size):
        stop = min(start + batch_size, len(source))
        examples = [preprocess(source[i], rng) for i in range(start, stop)]
        fill = batch_size - len(examples)
        batch = stack(examples + examples[:1] * fill)
        batch["weight"] = np.r_[np.ones(len(examples)), np.zeros(fill)].astype(np.float32)
        yield batch


def stack(examples: Sequence[dict[str, Any]]) -> Batch:
    """Examples to one batch."""
    return {key: np.stack([e[key] for e in examples]) for key in examples[0]}
