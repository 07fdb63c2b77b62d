"""Memory that the C library keeps without need: glibc's heap, where there is one."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any

M_ARENA_MAX = -8  # from malloc.h


def share_one_heap() -> None:
    """Makes the process's threads allocate from one heap.

    With a heap for each, every thread that has run a layer keeps memory for its activations.
    """
    _call("mallopt", M_ARENA_MAX, 1)


def give_back_memory() -> None:
    """Returns to the system what building and compiling have used, and no longer need."""
    gc.collect()
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function: Any = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
