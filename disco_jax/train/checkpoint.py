"""Checkpoints with orbax: asynchronous, the newest few kept, resumed exactly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from disco_jax.config import filled
from disco_jax.errors import DiscoError, require
from disco_jax.train.step import TrainState


class Checkpoints:
    """The checkpoints of one training phase, in one directory.

    Args:
      directory: where they are; created if it is missing.
      keep: how many of the newest to keep.

    Raises:
      DiscoError: if the directory cannot be written.
    """

    def __init__(self, directory: Path, *, keep: int = 2):
        require(keep >= 1, f"`checkpoint.keep` (={keep}) must be at least 1")
        check_writable(directory)
        self.directory = directory
        newest = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(), preservation_policy=newest
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, *, data: Any, settings: dict[str, Any]) -> None:
        """Starts writing; the state may be used and donated on.

        Args:
          state: what is trained.
          data: position of the input pipeline (JSON).
          settings: all that determines the result (JSON), compared when restoring.
        """
        step = int(state.step)
        if self.latest == step:
            return
        note = {"data": data, "settings": settings}
        self._checkpointer.save_async(step, pure(state), custom_metadata=note, force=True)

    def restore(self, like: TrainState, *, settings: dict[str, Any]) -> tuple[TrainState, Any]:
        """The newest state, placed as ``like`` is, and the position of the input pipeline.

        Raises:
          DiscoError: if there is none, other settings made it, or it is damaged.
        """
        self._checkpointer.wait()
        step = self.latest
        require(
            step is not None,
            f"`workdir` has no checkpoint in {self.directory}; train first (--mode=train)",
        )
        metadata = self._checkpointer.metadata(step).custom_metadata or {}
        saved: Any = json.loads(json.dumps(filled(metadata.get("settings", {}))))
        wrong = [k for k in settings if saved.get(k) != settings[k]]
        if wrong:
            key, now, before = _difference(wrong[0], settings[wrong[0]], saved.get(wrong[0]))
            raise DiscoError(
                f"`{key}` (={now!r}) differs from the checkpoint's (={before!r}) "
                f"in {self.directory}; restore the same config, "
                "or use another --workdir"
            )
        try:
            content = self._checkpointer.load(step, pure(like))
        except Exception as error:  # orbax raises many types for a damaged file
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise DiscoError(
                f"`checkpoint` {step} in {self.directory} cannot be read ({reason[:200]}); delete "
                f"the folder {step} there to go on from the one before"
            ) from None
        # Orbax gives keys of random numbers a placement that a program refuses.
        placed = [
            jax.device_put(leaf, wanted.sharding)
            for leaf, wanted in zip(jax.tree.leaves(content), jax.tree.leaves(like), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(like), placed), metadata.get("data")

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._checkpointer.close()


def _difference(key: str, now: Any, before: Any) -> tuple[str, Any, Any]:
    """The first field in which two settings differ, with its values."""
    if isinstance(now, dict) and isinstance(before, dict):
        for name in {**now, **before}:
            if now.get(name) != before.get(name):
                return _difference(f"{key}.{name}", now.get(name), before.get(name))
    return key, now, before


def pure(state: TrainState) -> dict[str, Any]:
    """Leaves by number: orbax stores arrays, and the program knows their order."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def check_writable(directory: Path) -> None:
    """Creates a directory, or says why it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DiscoError(
            f"`workdir` (={directory}) cannot be written ({error.strerror}); choose another with "
            "--workdir"
        ) from None
