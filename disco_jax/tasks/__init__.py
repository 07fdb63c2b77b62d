"""What a model is trained for: loss and metrics. They know nothing of nodes."""

from __future__ import annotations

import dataclasses
from typing import Any

from disco_jax.errors import require
from disco_jax.tasks.classification import Classification
from disco_jax.tasks.detection import Detection
from disco_jax.tasks.segmentation import Segmentation
from disco_jax.tasks.super_resolution import SuperResolution
from disco_jax.tasks.task import Task, shown

TASKS: dict[str, type[Any]] = {
    "classification": Classification,
    "detection": Detection,
    "segmentation": Segmentation,
    "super_resolution": SuperResolution,
}


def of(config: Any, num_classes: int) -> Task:
    """The task of a config, for data with so many classes.

    Raises:
      DiscoError: if there is no such task, or model and task enlarge images by different factors.
    """
    options = config.task.to_dict()
    facts = {
        "num_classes": num_classes,
        "label_smoothing": config.optimizer.label_smoothing,
        "mean": tuple(config.data.mean),
        "std": tuple(config.data.std),
    }
    scale = config.model.get("scale", 1)
    require(
        options.get("scale", 1) == scale,
        f"`task.scale` (={options.get('scale', 1)}) must be `model.scale` (={scale}); set both",
    )
    return make(options.pop("name"), options, facts)


def make(name: str, options: dict[str, Any], facts: dict[str, Any]) -> Task:
    """A task by name.

    Args:
      name: a key of ``TASKS``.
      options: its attributes.
      facts: what the data set and the config say anyway, of which it takes what it has use for.

    Raises:
      DiscoError: if there is no such task, or it does not have an option.
    """
    require(
        name in TASKS,
        f"`task.name` (={name!r}) must be one of {', '.join(TASKS)}; choose one of these",
    )
    known = {field.name for field in dataclasses.fields(TASKS[name])}
    unknown = sorted(options.keys() - known)
    require(
        not unknown,
        f"`task` {name!r} does not have {', '.join(unknown)}, but {', '.join(sorted(known))}; "
        "remove it",
    )
    return TASKS[name](**{k: v for k, v in (facts | options).items() if k in known})


__all__ = [
    "TASKS",
    "Classification",
    "Detection",
    "Segmentation",
    "SuperResolution",
    "Task",
    "make",
    "of",
    "shown",
]
