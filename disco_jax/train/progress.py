"""What a person sees while training runs, and what a program reads afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)


def progress_bar() -> Progress:
    """A bar with steps, throughput and time left."""
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


class MetricsWriter:
    """Appends metrics to ``metrics.jsonl``, and to TensorBoard where tensorboardX is installed."""

    def __init__(self, workdir: Path):
        self._path = workdir / "metrics.jsonl"
        self._board: Any = None
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(workdir / "tensorboard"))

    def write(self, phase: str, step: int, **metrics: float) -> None:
        """One line: phase, step, numbers."""
        with self._path.open("a") as file:
            file.write(json.dumps({"phase": phase, "step": step, **metrics}) + "\n")
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(f"{phase}/{name}", value, step)
            self._board.flush()
