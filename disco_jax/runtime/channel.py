"""Messages between two nodes over one TCP connection.

A message is one line of JSON: ``{"hello": node, "facts": {...}}``, ``{"go": {...}}``,
``{"alive": node}``, ``{"fault": cause}`` or ``{"bye": node}``. What one node gives to the others
comes as ``{"data": size}`` messages, each with so many bytes behind it, in small pieces so that
signs of life get through in between, and ``{"parts": [size, ...]}``, which says how to cut them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
from collections.abc import Iterable, Mapping
from typing import Any

Facts = Mapping[str, Any]


class Channel:
    """Lines of JSON, and bytes that follow them, over a socket."""

    def __init__(self, connection: socket.socket, timeout: float):
        connection.settimeout(timeout)
        self._connection, self._stream = connection, connection.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: Facts, data: bytes | memoryview = b"") -> None:
        with self._lock:
            self._connection.sendall(json.dumps(message).encode() + b"\n" + data)

    def receive(self) -> dict[str, Any]:
        """The next message; empty at the end."""
        line = self._stream.readline()
        message = json.loads(line) if line else {}
        if not isinstance(message, dict):
            raise ValueError(f"{line.strip()!r} is not a message")
        return message

    def read(self, size: int) -> bytes:
        """The bytes that follow a message."""
        data = self._stream.read(size)
        if len(data) != size:
            raise ValueError(f"{len(data)} of {size} bytes came")
        return data

    def drain(self, timeout: float) -> None:
        """Waits until the other end is gone."""
        self.patience(timeout)
        with contextlib.suppress(OSError):
            while self._stream.read(1):
                pass

    def patience(self, timeout: float) -> None:
        """Sets the seconds after which silence is an error."""
        self._connection.settimeout(timeout)


def send_all(channels: Iterable[Channel], message: Facts, data: bytes | memoryview = b"") -> None:
    """Sends a message to all that can still be reached."""
    for channel in channels:
        with contextlib.suppress(OSError):  # its listener finds out what is wrong
            channel.send(message, data)


def cut(data: bytes, sizes: Iterable[int]) -> list[bytes]:
    """Byte strings of these sizes, one after another.

    >>> cut(b"abc", [1, 0, 2])
    [b'a', b'', b'bc']
    """
    ends = [0, *itertools.accumulate(sizes)]
    if ends[-1] != len(data):
        raise ValueError(f"{len(data)} of {ends[-1]} bytes came")
    return [data[start:stop] for start, stop in itertools.pairwise(ends)]
