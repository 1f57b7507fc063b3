"""Looks for a notice of termination, in a thread of its own: a metadata service may take seconds to answer."""

from __future__ import annotations

import threading
from collections.abc import Callable

from elastic.host.notices import Notice, NoticeSource, Unclear

EVERY_S = 1.0


class NoticeWatch:
    """Calls `found` once, with the notice, and `say` once for each time that `source` begins to be unclear; both in its thread."""

    def __init__(self, source: NoticeSource, found: Callable[[Notice], None], say: Callable[[str], None]) -> None:
        self._source, self._found, self._say = source, found, say
        self._closed = threading.Event()
        self._unclear = False
        threading.Thread(target=self._watch, name="elastic-notices", daemon=True).start()

    def close(self) -> None:
        """Ends the thread; it may still wait for an answer, with which nothing is done."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.is_set():
            notice = self._look()
            if notice is not None and not self._closed.is_set():
                self._found(notice)
                return
            self._closed.wait(EVERY_S)

    def _look(self) -> Notice | None:
        try:
            notice = self._source.look()
        except Unclear as error:
            if not self._unclear and not self._closed.is_set():
                self._say(
                    f"{self._source.title} gives no notice of termination, and may not be able to: {error}; it is asked again and again"
                )
            self._unclear = True
            return None
        self._unclear = False
        return notice
