"""Checkpoints with orbax: asynchronous, the newest few kept, resumed exactly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

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

    def save(self, state: TrainState, *, data: Any, architecture: dict[str, Any]) -> None:
        """Starts writing; the state may be used and donated on.

        Args:
          state: what is trained.
          data: position of the input pipeline (JSON).
          architecture: what the model was built from (JSON), compared when restoring.
        """
        step = int(state.step)
        if self.latest == step:
            return
        note = {"data": data, "architecture": architecture}
        self._checkpointer.save_async(step, pure(state), custom_metadata=note, force=True)

    def restore(self, like: TrainState, *, architecture: dict[str, Any]) -> tuple[TrainState, Any]:
        """The newest state, placed as ``like`` is, and the position of the input pipeline.

        Raises:
          DiscoError: if there is none, it is of another architecture, or it is damaged.
        """
        self._checkpointer.wait()
        step = self.latest
        require(
            step is not None,
            f"`workdir` has no checkpoint in {self.directory}; train first (--mode=train)",
        )
        metadata = self._checkpointer.metadata(step).custom_metadata or {}
        saved: Any = metadata.get("architecture", {})
        wrong = [k for k in architecture if saved.get(k) != architecture[k]]
        if wrong:
            key = wrong[0]
            raise DiscoError(
                f"`{key}` (={architecture[key]!r}) differs from the checkpoint's "
                f"(={saved.get(key)!r}) in {self.directory}; restore the same config, "
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
        leaves = jax.tree.leaves(content)
        return jax.tree.unflatten(jax.tree.structure(like), leaves), metadata.get("data")

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._checkpointer.close()


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
