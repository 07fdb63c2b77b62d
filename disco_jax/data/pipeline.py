"""Batches for training and evaluation, through grain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from disco_jax.data.images import Source
from disco_jax.data.preprocess import Preprocess
from disco_jax.errors import require

Batch = dict[str, np.ndarray]


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
