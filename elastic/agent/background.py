"""A thread for computations during which the agent's event loop must not stand still, since others would take it for lost."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

_Task = tuple[Callable[[], Any], Callable[[Any], None]]


class Background:
    """Makes computations one after another; `post` makes the loop's thread call something.

    Computations must not touch what the loop changes: their inputs are values.
    """

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def run(self, compute: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Queues a computation; the loop gets its result by `done`, or its exception. Does not wait."""
        self._tasks.put((compute, done))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="elastic-compute", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Drops results that have not arrived. A computation that runs ends with the process, if not before."""
        self._closed = True

    def _run(self) -> None:
        while not self._closed:
            compute, done = self._tasks.get()
            try:
                result = compute()
            except Exception as error:  # the thread's boundary: it is raised in the loop, as if it had been made there
                self._post(lambda error=error: self._raise(error))
            else:
                self._post(lambda result=result, done=done: self._give(done, result))

    def _give(self, done: Callable[[Any], None], result: Any) -> None:
        if not self._closed:
            done(result)

    def _raise(self, error: Exception) -> None:
        if not self._closed:
            raise error
