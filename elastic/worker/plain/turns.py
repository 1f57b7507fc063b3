"""Two greenlets of one thread that take turns: the user's loop, and the engine that takes the steps.

The engine calls a layer and waits for its output; the user's loop asks the loader for data and computes. Neither can be called by the other
as a function, so each has its own stack. It is one thread, since torch's settings are a thread's: gradient mode, autocast, the intra-op
pool. What both must not share of them is exchanged at each switch (`_own_modes`).
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from elastic.worker.report import Report

_DEVICES = ("cpu", "cuda")
_alive: list[greenlet] = []
"""Keeps engines that were left in the middle of a step: the garbage collector would raise an exception inside of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The engine needs the gradients of this micro-batch. `states`: those of all random number generators, for the loop's body."""

    step: int
    micro_batch: int
    contents: Any
    states: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A step is committed, and complete on all workers."""

    report: Report


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine has taken all steps of this pass."""


Event = Work | Committed | Ended


class _Left(Exception):
    """The user's loop was left after a committed step."""


class Turns:
    """The engine's greenlet, seen from the user's, and the other way round."""

    def __init__(self) -> None:
        self._engine: greenlet | None = None

    @property
    def in_engine(self) -> bool:
        """Whether the engine's greenlet is running."""
        return self._engine is not None and getcurrent() is self._engine

    def begin(self, run: Callable[[], None]) -> Event:
        """Starts an engine that calls `run`; returns its first event."""

        def until_left(_: Any) -> Event:
            with suppress(_Left):
                run()
            return Ended()

        self._engine = greenlet(until_left)
        self._engine.gr_context = contextvars.copy_context()
        _alive.append(self._engine)
        return self.to_engine(None)

    def to_engine(self, value: Any) -> Event:
        """Continues the engine, where it waits for `value`; returns its next event. Errors of the engine are raised here."""
        assert self._engine is not None  # begin() is called first
        with _own_modes():
            _plain_modes()
            event = self._engine.switch(value)
        if self._engine.dead:
            _alive.remove(self._engine)
        return event

    def to_user(self, event: Event) -> Any:
        """Continues the user's loop with an event; returns the value with which the loop continues the engine."""
        with _own_modes():
            return self._engine.parent.switch(event)  # type: ignore[union-attr]

    def leave(self) -> None:
        """Ends the engine, which waits after a committed step."""
        assert self._engine is not None
        with _own_modes():
            _plain_modes()
            self._engine.throw(_Left)
        _alive.remove(self._engine)


def _plain_modes() -> None:
    torch.set_grad_enabled(True)
    for device in _DEVICES:
        if torch.is_autocast_enabled(device):
            torch.set_autocast_enabled(device, False)
            torch.clear_autocast_cache()  # else casts of parameters outlive their update


@contextmanager
def _own_modes() -> Iterator[None]:
    """Restores the modes of this greenlet when the other one has switched back."""
    gradients = torch.is_grad_enabled()
    autocast = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES]
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        for device, enabled, dtype in autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
