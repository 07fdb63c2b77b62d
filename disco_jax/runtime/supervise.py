"""Restarts a command that serves a stream, without losing or repeating an item."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from disco_jax.runtime.peers import EXIT_CODE

LONGEST_PAUSE = 8.0  # seconds


class Supervisor:
    """Owns a stream of items, and a process that answers each with one line.

    The process reads items from stdin, a line each, and writes its answers to stdout in the same
    order. When it dies by a signal or because of another node, a new one gets the items that have
    no answer yet.

    Args:
      command: what to run.
      items: what to answer, without line breaks; taken as they are needed.
      say: called with each answer, in order.
      restarts: how often to start again.
      ahead: how many items the process may have before it answers them; at least its batch.
      again: arguments that the command has from its second start on.
    """

    def __init__(
        self,
        command: Sequence[str],
        items: Iterable[str],
        say: Callable[[str], None],
        *,
        restarts: int,
        ahead: int,
        again: Sequence[str] = (),
    ):
        self._command, self._items, self._say = [*command], items, say
        self._again = again
        self._restarts = restarts
        self._unanswered: deque[str] = deque()
        self._room = threading.Semaphore(ahead)
        self._lock = threading.Lock()  # of the process, what it was given, and whether that is all
        self._process: subprocess.Popen[bytes] | None = None
        self._complete = False
        self._broken: Exception | None = None  # what the items raised

    def run(self) -> int:
        """Runs to the end of the items; returns the exit code of the last process.

        What the items raise ends them: it is raised here when all before it have their answers.
        """
        threading.Thread(target=self._feed, daemon=True).start()
        for restart in range(self._restarts + 1):
            if restart:
                time.sleep(min(2.0 ** (restart - 2), LONGEST_PAUSE))
            code = self._run_once([*self._command, *(self._again if restart else ())])
            if code >= 0 and code != EXIT_CODE:
                if self._broken is not None:
                    raise self._broken
                return code
            print(
                f"the process ended with code {code}, {self._restarts - restart} restarts left",
                file=sys.stderr,
                flush=True,
            )
        return code if code >= 0 else 128 - code

    def _run_once(self, command: Sequence[str]) -> int:
        process = self._start(command)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.endswith(b"\n"):  # not what a dying process began to write
                    self._say(line.decode().rstrip("\n"))
                    self._unanswered.popleft()
                    self._room.release()
            return process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            with self._lock, contextlib.suppress(BrokenPipeError):
                process.stdin.close()

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        with self._lock:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe)
            self._give(*self._unanswered)
            return self._process

    def _feed(self) -> None:
        try:
            for item in self._items:
                self._room.acquire()
                with self._lock:
                    self._unanswered.append(item)
                    self._give(item)
        except Exception as error:  # whatever an iterator may raise
            self._broken = error
        with self._lock:
            self._complete = True
            self._give()

    def _give(self, *items: str) -> None:
        """Hands items to the process if it is alive; what it does not answer goes to the next."""
        if self._process is None or self._process.stdin is None or self._process.stdin.closed:
            return
        stdin = self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            stdin.writelines(os.fsencode(item) + b"\n" for item in items)
            stdin.flush()
            if self._complete:
                stdin.close()
