"""The agent's event loop: one thread waits for descriptors, timers, and calls from other threads."""

from __future__ import annotations

import os
import selectors
import time
from collections import deque
from collections.abc import Callable
from typing import Any

Act = Callable[[], None]


class Loop:
    """An event loop. Only its own thread, in which every `act` runs, may call it; any thread may call `post`."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: dict[str, tuple[float, Act]] = {}
        self._posted: deque[Act] = deque()
        self._wake_read, self._wake_write = os.pipe()
        self.watch(self._wake_read, self._act_posted)

    def watch(self, source: Any, act: Act, *, writable: bool = False) -> None:
        """Calls `act` while `source` (a descriptor, or an object with `fileno`) can be read or, with `writable`, written."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writable else 0)
        if source not in self._selector.get_map():
            self._selector.register(source, events, act)
        elif self._selector.get_key(source).events != events:
            self._selector.modify(source, events, act)

    def forget(self, source: Any) -> None:
        """Stops watching `source`, if it did. Call it before the descriptor is closed: its number may be reused."""
        if source in self._selector.get_map():
            self._selector.unregister(source)

    def post(self, act: Act) -> None:
        """Makes the loop's thread call `act`; any thread may call it."""
        self._posted.append(act)
        os.write(self._wake_write, b"\0")

    def set_timer(self, seconds: float, act: Act, name: str = "") -> None:
        """Calls `act` once after `seconds`. A name has one timer; a new one replaces it."""
        self._timers[name] = (time.monotonic() + seconds, act)

    def clear_timer(self, name: str = "") -> None:
        self._timers.pop(name, None)

    def timing(self, name: str = "") -> bool:
        """Whether this timer is set and has not fired."""
        return name in self._timers

    def turn(self) -> None:
        """Waits for the next event, and acts on it."""
        due = min((at for at, _ in self._timers.values()), default=None)
        events = self._selector.select(None if due is None else max(0.0, due - time.monotonic()))
        for key, _ in events:
            key.data()
        now = time.monotonic()
        for name in [name for name, (at, _) in self._timers.items() if now >= at]:
            if name in self._timers:  # an earlier act may have cleared it
                self._timers.pop(name)[1]()

    def _act_posted(self) -> None:
        os.read(self._wake_read, 4096)
        while self._posted:
            self._posted.popleft()()
