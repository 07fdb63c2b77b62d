"""Control connections between nodes: who is there, whether all agree, and who is still alive.

Every node keeps one TCP connection to node 0, apart from the links that activations cross. JAX
itself aborts a process whose peers are missing, without saying which; so the nodes meet here first.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.errors import JaxRuntimeError

from disco_jax.errors import DiscoError
from disco_jax.runtime.channel import Channel, Facts, cut, send_all

EXIT_CODE = 3
PATIENCE = 5.0  # seconds for whoever connects to say who it is
PIECE = 1 << 16  # bytes of data in a message


class AbsentError(DiscoError):
    """A node did not come in time; it may when the same is started again."""

    exit_code = EXIT_CODE


def end_process(cause: str) -> None:
    """Says in one line why, and ends the process, which may be waiting inside a collective."""
    print(f"error: {cause}", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


class Peers:
    """The other nodes, watched until :meth:`close`.

    Attributes:
      node: which node this is.
      failed: whether it left because something went wrong here.

    Args:
      node: which node this is.
      channels: the connection to each node that this one talks to.
      timeout: seconds of silence after which a node counts as lost.
      on_fault: called once, in a thread, with what happened to which node.
    """

    def __init__(
        self,
        node: int,
        channels: dict[int, Channel],
        *,
        timeout: float,
        on_fault: Callable[[str], None] = end_process,
    ):
        self.node, self._channels, self._timeout, self._on_fault = node, channels, timeout, on_fault
        self.failed = False
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._given: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._listen, args=item, daemon=True)
            for item in channels.items()
        ]
        for channel in channels.values():
            channel.patience(timeout)
        for thread in (*self._threads, threading.Thread(target=self._beat, daemon=True)):
            thread.start()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, JaxRuntimeError):  # of a collective, maybe, that misses a node
            self._wait(self._timeout)  # who hears that one is lost ends this process, and names it
        self.close(None if error is None else str(error) or type(error).__name__)

    def close(self, fault: str | None = None) -> None:
        """Leaves: waits until all are done, or tells the others what went wrong here."""
        if fault is not None:
            self.failed = True
            self._over.set()
            self._tell({"fault": f"node {self.node}: {fault.splitlines()[0]}"})
            return
        self._over.set()
        self._tell({"bye": self.node})
        self._wait(self._timeout)

    def _wait(self, seconds: float) -> None:
        """Until all others are done or gone."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def give(self, parts: Sequence[bytes]) -> None:
        """Sends byte strings to the nodes this one talks to, for their next :meth:`take`."""
        data = memoryview(b"".join(parts))
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            self._tell({"data": len(piece)}, piece)
        self._tell({"parts": [len(part) for part in parts]})

    def take(self) -> list[bytes]:
        """Waits for what node 0 gives next."""
        return self._given.get()

    def _listen(self, node: int, channel: Channel) -> None:
        data = bytearray()
        try:
            while message := channel.receive():
                if "data" in message:
                    data += channel.read(message["data"])
                if "parts" in message:
                    self._given.put(cut(bytes(data), message["parts"]))
                    data.clear()
                if "bye" in message:
                    self._see_off(node)
                    return
                if "fault" in message:
                    if self.node == 0:
                        channel.drain(PATIENCE)
                    self._fail(message["fault"], source=node)
                    return
            cause = f"node {node} ended without a word; see what it printed last"
        except TimeoutError:
            cause = f"node {node} was not heard of for {self._timeout:g} s: it or its link stalls"
        except (OSError, ValueError, TypeError) as error:
            cause = f"the connection to node {node} broke ({error})"
        self._fail(cause, source=node)

    def _see_off(self, node: int) -> None:
        """A node is done; whoever is not soon would wait for it in vain."""
        if not self._over.wait(self._timeout):
            self._fail(f"node {node} left {self._timeout:g} s ago, and this one is not done")

    def _beat(self) -> None:
        while not self._over.wait(self._timeout / 5):
            self._tell({"alive": self.node})

    def _tell(
        self, message: Facts, data: bytes | memoryview = b"", *, but: int | None = None
    ) -> None:
        channels = (c for node, c in self._channels.items() if node != but)
        send_all(channels, message, data)

    def _fail(self, cause: str, *, source: int | None = None) -> None:
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
        self._tell({"fault": cause}, but=source)
        if self.node == 0:  # with it goes JAX's coordinator, without which the others abort
            self._wait(PATIENCE)
        self._on_fault(cause)


def meet(
    coordinator: str, nodes: int, node: int, facts: Facts, timeout: float
) -> tuple[dict[int, Channel], Facts]:
    """Waits until all nodes are there and agree.

    Args:
      coordinator: ``host:port`` at which node 0 listens.
      nodes: how many there are.
      node: which this is.
      facts: what must be the same everywhere, such as the number of nodes and the versions; what
        node 0 has under ``"go"`` is not compared but given to all.
      timeout: seconds to wait.

    Returns:
      The connections, and node 0's ``"go"``.

    Raises:
      DiscoError: if a node does not come, comes twice, or has other facts. It names the node.
    """
    deadline = time.monotonic() + timeout
    host, _, port = coordinator.rpartition(":")
    if node == 0:
        channels = _welcome(int(port), nodes, facts, deadline, timeout)
        return channels, facts["go"]
    channel = _knock(host.strip("[]"), int(port), deadline, timeout)
    channel.patience(timeout + PATIENCE)  # node 0 may give up a little later, and say why
    try:
        channel.send({"hello": node, "facts": {k: v for k, v in facts.items() if k != "go"}})
        answer = channel.receive()
    except OSError:
        answer = {}
    if "go" in answer:
        return {0: channel}, answer["go"]
    if "fault" in answer:
        raise (AbsentError if answer["again"] else DiscoError)(answer["fault"])
    raise AbsentError(
        f"node 0 at {coordinator} did not answer within {timeout:g} s; start the same command on "
        "every host"
    )


def _welcome(
    port: int, nodes: int, facts: Facts, deadline: float, timeout: float
) -> dict[int, Channel]:
    """Node 0: hears everybody, and says go, or what is wrong."""
    here: dict[int, Channel] = {}
    error: DiscoError | None = None
    remedy = "start the same command on every host"
    with _server(port) as server:
        while len(here) < nodes - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(n) for n in range(1, nodes) if n not in here)
                absent = f"node {missing} did not come within {timeout:g} s; {remedy}"
                error = error or AbsentError(absent)
                break
            heard = _hear(connection, timeout)
            if heard is None:
                continue
            channel, hello = heard
            cause = _objection(hello, here, nodes, facts)
            here[hello["hello"] if cause is None else nodes + len(here)] = channel  # to be told
            if cause is not None and error is None:
                error = DiscoError(f"{cause}; {remedy}")
                deadline = min(deadline, time.monotonic() + PATIENCE)  # who is on its way hears it
    if error is not None:
        again = isinstance(error, AbsentError)
        send_all(here.values(), {"fault": str(error), "again": again})
        raise error
    send_all(here.values(), {"go": facts["go"]})
    return here


def _hear(connection: socket.socket, timeout: float) -> tuple[Channel, Facts] | None:
    """Who has connected; None for what is not a node."""
    channel = Channel(connection, min(timeout, PATIENCE))
    with contextlib.suppress(OSError, ValueError):
        hello = channel.receive()
        if {"hello", "facts"} <= set(hello):
            return channel, hello
    return None


def _server(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise DiscoError(
            f"`coordinator` port (={port}) cannot be listened at ({error.strerror}); choose a free "
            "one, the same on every host"
        ) from None


def _knock(host: str, port: int, deadline: float, timeout: float) -> Channel:
    """Another node: tries until node 0 opens."""
    while True:
        try:
            left = max(0.01, deadline - time.monotonic())
            return Channel(socket.create_connection((host, port), timeout=left), timeout)
        except OSError as error:
            if time.monotonic() > deadline:
                raise AbsentError(
                    f"node 0 at {host}:{port} did not answer within {timeout:g} s ({error}); start "
                    "the same command on every host, and check the address and that its port is "
                    "open"
                ) from None
            time.sleep(0.1)


def _objection(hello: Facts, here: Mapping[int, Any], nodes: int, facts: Facts) -> str | None:
    """What is wrong with a node that has come."""
    node, theirs = hello["hello"], hello["facts"]
    for name, mine in facts.items():
        if name != "go" and theirs.get(name) != mine:
            return f"node {node} has `{name}` (={theirs.get(name)!r}), but node 0 has {mine!r}"
    if node not in range(1, nodes) or node in here:
        return f"`node_id` (={node}) came twice, or is not 1 ... {nodes - 1}"
    return None
