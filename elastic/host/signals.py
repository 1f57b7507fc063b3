"""What SIGINT, SIGTERM and SIGHUP do to the processes of a job: it stops at the next step boundary, saves what is due, and leaves nothing.

Ctrl-C reaches the launcher. Slurm, Kubernetes and systemd send SIGTERM to the launcher, or to every process of the job at once, and SIGKILL
some time later. So all processes have to outlive the first signal until the stop is done:

    launcher      tells the agent to stop; the second signal ends the job at once
    agent         stops the job as if the launcher had told it to, which may be hit in vain (a thread cannot take signals)
    fork server   goes on
    worker        goes on if the job stops; a signal that is for it alone ends it, a moment later

Between exec and the first handler these signals are blocked (`shielded`, `unshield`), and delivered afterwards. A signal that was ignored
when a process began (`nohup`, `&` in a shell without job control) stays ignored.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from elastic.errors import Terminated
from elastic.host.channel import Channel

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ALONE_S = 3.0
"""How long a worker that got SIGTERM waits for the news that the job stops."""


@contextmanager
def shielded() -> Iterator[None]:
    """What is started meanwhile begins with the signals blocked, until it calls `unshield`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unshield() -> None:
    """Has this process, started in `shielded`, take signals."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


class StopRequests:
    """The launcher's side. `first` is the signal that asked for the stop, None if there was none.

    The first signal asks the agent to stop at a step boundary; the second to stop at once, and raises KeyboardInterrupt or Terminated.
    Signals that come before the agent listens wait for it; none interrupts what cleans up.
    """

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._last: signal.Signals | None = None
        self._count = 0
        self._channel: Channel | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Takes the signals over, in the main thread; elsewhere they do what they did before."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in STOPPING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            before = {number: signal.signal(number, self._catch) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def forwarded(self, channel: Channel) -> Iterator[None]:
        """Tells the agent at the other end, which listens from here on, until it has had its last word."""
        self._channel = channel
        try:
            for number in range(1, min(self._count, 2) + 1):
                self._forward(number)
            yield
        finally:
            self._channel = None

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        self._last = signal.Signals(number)
        self.first = self.first or self._last
        self._count += 1
        if self._channel is not None and not self._channel.closed:
            self._forward(self._count)

    def _forward(self, count: int) -> None:
        assert self._channel is not None  # both callers have looked
        assert self._last is not None
        if count == 1:
            self._channel.send({"type": "stop"})
            _say(self._last)
            return
        self._channel.send({"type": "kill"})
        if self._last is signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated(exit_code(self._last))


def exit_code(number: signal.Signals) -> int:
    """What a shell shows for a program that a signal has ended: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + number


def _say(number: signal.Signals) -> None:
    again = "press Ctrl-C again" if number is signal.SIGINT else "send it again"
    cause = "" if number is signal.SIGINT else f"{number.name}: "
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # closed, or its terminal is gone
            print(f"elastic: {cause}stopping at the next step boundary; {again} to stop at once", file=sys.stderr, flush=True)


def obey(act: Callable[[], None]) -> None:
    """The agent's side: calls `act` in the main thread for each of the signals."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: act())
    unshield()


def outlive() -> None:
    """The fork server's side: goes on, and so does what it forks. It ends with its agent."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    unshield()


def outlive_a_stop(stopping: Callable[[], bool]) -> None:
    """A worker's side: SIGTERM and SIGHUP end it only if the job is not `stopping` a moment later. SIGINT is the launcher's business.

    What this process starts takes signals as usual.
    """
    alone = _Alone(stopping)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, alone.caught)
    os.register_at_fork(before=alone.hold, after_in_parent=alone.release, after_in_child=alone.forget)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Alone:
    """Tells a signal for this process alone from one for all. `signal.signal` belongs to the main thread, so a thread sends it again."""

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self._stopping = stopping
        self._waiting = self._alone = False
        self._held = threading.local()

    def caught(self, number: int, _frame: FrameType | None) -> None:
        if self._alone:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self._waiting and not self._stopping():
            self._waiting = True
            _thread.start_new_thread(self._wait, (number,))  # takes no lock that the interrupted code may hold

    def hold(self) -> None:
        """Around a fork: else a child could take a signal with its parent's handler."""
        self._held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)

    def release(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._held.mask)

    def forget(self) -> None:
        """In a child: who sends it SIGTERM wants its end."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == self.caught:
                signal.signal(number, signal.SIG_DFL)
        self.release()

    def _wait(self, number: int) -> None:
        deadline = time.monotonic() + ALONE_S
        while time.monotonic() < deadline and not self._stopping():
            time.sleep(0.1)
        if not self._stopping():
            self._alone = True
            os.kill(os.getpid(), number)
        self._waiting = False
