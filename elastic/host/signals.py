"""Handles SIGINT, SIGTERM and SIGHUP in a job's processes: it stops at the next step boundary, saves what is due, and cleans up.

Ctrl-C reaches the launcher. Slurm, Kubernetes and systemd send SIGTERM to the launcher, or to every process of the job at once, and SIGKILL
some time later. So all processes have to survive the first signal until the job has stopped:

    launcher      sends the agent a stop request; the second signal ends the job at once
    agent         stops the job as on the launcher's request, which may not come: a launcher in a thread cannot handle signals
    fork server   continues
    worker        continues if the job stops; a signal sent only to this worker ends it a moment later

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
"""How long a worker that got SIGTERM waits for the job's stop request."""


@contextmanager
def shielded() -> Iterator[None]:
    """Blocks the signals in processes that are started in this context, until they call `unshield`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unshield() -> None:
    """Unblocks the signals in a process that was started in `shielded`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


class StopRequests:
    """The launcher's signal handling. `first` is the signal that requested the stop, None if there was none.

    The first signal asks the agent to stop at a step boundary; the second to stop at once, and raises KeyboardInterrupt or Terminated.
    Signals that arrive before the agent listens are kept for it; no signal interrupts the cleanup.
    """

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._last: signal.Signals | None = None
        self._count = 0
        self._channel: Channel | None = None

    def noticed(self) -> None:
        """Notes that the agent stops because of a notice of termination, which counts as SIGTERM."""
        self.first = self.first or signal.SIGTERM

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handles the signals in this context if called in the main thread; in another thread their handlers stay."""
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
        """Forwards the signals to the agent at the other end, until the context ends with the agent's last message."""
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
        assert self._channel is not None  # both callers have checked it
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
    """Returns the shell's exit code for a program that a signal has ended: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + number


def _say(number: signal.Signals) -> None:
    again = "press Ctrl-C again" if number is signal.SIGINT else "send it again"
    cause = "" if number is signal.SIGINT else f"{number.name}: "
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # closed, or its terminal is gone
            print(f"elastic: {cause}stopping at the next step boundary; {again} to stop at once", file=sys.stderr, flush=True)


def obey(act: Callable[[], None]) -> None:
    """Makes the agent call `act`, in the main thread, for each of the signals."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: act())
    unshield()


def outlive() -> None:
    """Makes the fork server, and the processes it forks, survive the signals. It ends with its agent."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    unshield()


def outlive_a_stop(stopping: Callable[[], bool]) -> None:
    """Makes SIGTERM and SIGHUP end a worker only if the job is not `stopping` a moment later. SIGINT is ignored: the launcher handles it.

    SIGTERM and SIGHUP act as usual on child processes.
    """
    alone = _Alone(stopping)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, alone.caught)
    os.register_at_fork(before=alone.hold, after_in_parent=alone.release, after_in_child=alone.forget)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Alone:
    """Distinguishes a signal for this process alone from one for all. A thread sends it again: only the main thread may set handlers."""

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
        """Blocks the signals around a fork: otherwise a child could run its parent's handler."""
        self._held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)

    def release(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._held.mask)

    def forget(self) -> None:
        """Restores the default handlers in a child: SIGTERM and SIGHUP end it."""
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
