"""A thread that does a loop's errands at etcd, one after the other, and repeats them for as long as etcd is away."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elastic.errors import Conflict, EtcdUnavailable

RETRY_S = 0.2
_STOP_S = 1.0  # a call that etcd does not answer takes longer, and its result is wanted by nobody


def _ignore(_: Any) -> None:
    """For errands whose result nobody wants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """`call` is repeated until it returns or raises Conflict, which `done` or `refused` gets; unless `wanted` says no before a try."""

    call: Callable[[], Any]
    done: Callable[[Any], None] = _ignore
    refused: Callable[[Conflict], None] = _ignore
    wanted: Callable[[], bool] = lambda: True


class Clerk:
    """`post` hands what `done`, `refused`, `away` (once per outage) and `back` have to do to the loop's thread."""

    def __init__(
        self, post: Callable[[Callable[[], None]], None], away: Callable[[EtcdUnavailable], None], back: Callable[[], None]
    ) -> None:
        self._post = post
        self._away = away
        self._back = back
        self._errands: queue.SimpleQueue[Errand | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elastic-clerk", daemon=True)
        self._thread.start()

    def run(self, errand: Errand) -> None:
        """Has it done after those before it; does not wait."""
        self._errands.put(errand)

    def stop(self) -> None:
        """Leaves what is not done undone."""
        self._stopped.set()
        self._errands.put(None)
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        while (errand := self._errands.get()) is not None and not self._stopped.is_set():
            self._do(errand)

    def _do(self, errand: Errand) -> None:
        outage = False
        while errand.wanted() and not self._stopped.is_set():
            try:
                result = errand.call()
            except EtcdUnavailable as error:
                if not outage:
                    self._post(lambda error=error: self._away(error))
                outage = True
                self._stopped.wait(RETRY_S)
                continue
            except Conflict as error:
                self._post(lambda error=error: errand.refused(error))
            else:
                self._post(lambda result=result: errand.done(result))
            break
        if outage and not self._stopped.is_set():
            self._post(self._back)
