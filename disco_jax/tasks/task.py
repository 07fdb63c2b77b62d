"""What a task is to training and evaluation, which know no other name of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Float, Shaped

Batch = Mapping[str, Any]
Measures = dict[str, Shaped[Array, "..."]]


class Task(Protocol):
    """A loss, what is learned from a teacher, and metrics.

    A batch has ``"image"``, ``f32[b, h, w, c]``, and whatever the task's truth is; ``outputs`` are
    what the model makes of the images.

    Attributes:
      metric: the one by which models are compared; more is better.
      unit: ``"%"`` for a share, which is shown times 100, or ``"dB"``.
    """

    @property
    def metric(self) -> str: ...

    @property
    def unit(self) -> str: ...

    def loss(self, outputs: Any, batch: Batch) -> Float[Array, ""]:
        """Mean over the batch."""
        ...

    def imitation(self, outputs: Any, teacher: Any, temperature: float) -> Float[Array, ""]:
        """How far the outputs are from a teacher's."""
        ...

    def measure(self, outputs: Any, batch: Batch) -> Measures:
        """What one batch says, under ``jit``; ``batch["weight"]``, ``f32[b]``, is 0 for fill."""
        ...

    def answer(self, outputs: Any) -> Measures:
        """What is to be known of each image, under ``jit``, in as few numbers as it takes."""
        ...

    def said(self, answer: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The answer for one image as JSON has it; a picture is under ``"picture"``."""
        ...

    def summary(self, found: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """The metrics, from the measures of all batches."""
        ...


def shown(value: float, unit: str) -> str:
    """A value of a metric for people.

    >>> shown(0.9215, "%"), shown(31.2, "dB")
    ('92.15 %', '31.20 dB')
    """
    return f"{100 * value:.2f} %" if unit == "%" else f"{value:.2f} {unit}"
