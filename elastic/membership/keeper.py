"""Keeps the private etcd running: whenever it ends, it is restarted on its data, and without its data if that does not help.

A restart without data loses nothing: the agent writes its keys again (`Attempts.restore`), and there is no other agent. All of this runs in
the agent's loop, since etcd dies with the loop's thread. Training continues during a restart.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from elastic.errors import EtcdFull, EtcdUnavailable
from elastic.membership.server import PrivateEtcd, how_it_ended

STABLE_S = 5.0  # a start counts as successful after running for so long
SILENT_S = 4.0  # an etcd whose process lives but has not answered for so long is killed; the next time after twice as long
_PATIENCE_S = 60.0  # the longest such time; an etcd that has run for so long gets the shortest again
_LONGEST_S = 10.0
_TIMER = "etcd"


class LoopLike(Protocol):
    """The part of the agent's loop that a keeper needs."""

    def watch(self, source: Any, act: Callable[[], None]) -> None: ...
    def forget(self, source: Any) -> None: ...
    def post(self, act: Callable[[], None]) -> None: ...
    def set_timer(self, seconds: float, act: Callable[[], None], name: str = "") -> None: ...
    def clear_timer(self, name: str = "") -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NextStart:
    """How to restart etcd (`empty`: without its data), and after how many seconds."""

    empty: bool
    after_s: float


def next_start(failures: int) -> NextStart:
    """Decides the next start after `failures` starts in a row that failed or ended soon after."""
    if failures == 0:
        return NextStart(empty=False, after_s=0.0)
    return NextStart(empty=True, after_s=0.0 if failures == 1 else min(2.0 ** (failures - 2), _LONGEST_S))


class Keeper:
    """Watches one private etcd."""

    def __init__(
        self, server: PrivateEtcd, loop: LoopLike, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._server = server
        self._loop = loop
        self._say = say
        self._clock = clock
        self._failures = -1  # the first end does not count as a failure, however early it comes
        self._empty = False
        self._ending = False
        self._patience_s = SILENT_S
        self._said = ""
        self._started_at = clock()
        self._pidfd: int | None = None
        self._watch()

    def unanswered(self, error: EtcdUnavailable, seconds: float) -> None:
        """Kills an etcd that has not answered for `seconds`, or has no space, so that it is restarted."""
        running_s = self._clock() - self._started_at
        if self._ending or self._pidfd is None:
            return
        if running_s > _PATIENCE_S:
            self._patience_s = SILENT_S
        if isinstance(error, EtcdFull):
            self._empty = True
        elif min(seconds, running_s) < self._patience_s:
            return
        else:  # on an overloaded machine it may only be slow: it must not be killed again and again
            self._patience_s = min(2 * self._patience_s, _PATIENCE_S)
        self._ending = True
        self._tell(f"{error}: it is killed and restarted")
        self._server.kill()

    def close(self) -> None:
        """Stops watching: etcd is not restarted any more."""
        self._loop.clear_timer(_TIMER)
        self._forget()

    def _watch(self) -> None:
        self._pidfd = os.pidfd_open(self._server.pid)
        self._loop.watch(self._pidfd, self._ended)

    def _forget(self) -> None:
        if self._pidfd is not None:
            self._loop.forget(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def _ended(self) -> None:
        self._forget()
        status = self._server.reap()
        well = self._server.serving and self._clock() - self._started_at > STABLE_S
        reason = "" if status < 0 else f" ({self._server.reason})"
        self._again(f"the private etcd {how_it_ended(status)}{reason}", well=well)

    def _again(self, happened: str, *, well: bool) -> None:
        self._failures = 0 if well else self._failures + 1
        following = next_start(self._failures)
        empty = following.empty or self._empty
        how = "without its data, which the agent writes again" if empty else "on its data"
        self._tell(f"{happened}: it is restarted {how}; training continues")
        if following.after_s:
            self._loop.set_timer(following.after_s, lambda: self._start(empty=empty), _TIMER)
        else:
            self._start(empty=empty)

    def _start(self, *, empty: bool) -> None:
        self._empty = self._ending = False
        self._started_at = self._clock()
        try:
            self._server.start(empty=empty)
        except EtcdUnavailable as error:
            self._again(str(error), well=False)
        else:
            with suppress(ProcessLookupError):  # cannot happen: it is a child that only this thread reaps
                self._watch()

    def _tell(self, sentence: str) -> None:
        """Reports a sentence, unless it equals the last one."""
        if sentence != self._said:
            self._say(sentence)
        self._said = sentence
