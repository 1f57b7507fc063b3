"""What `elastic.run(callbacks=[...])` calls, and the thread that calls it."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from elastic.observe.console import say
from elastic.observe.incident import Incident
from elastic.observe.members import Members
from elastic.observe.step_log import Step
from elastic.worker.report import Report

_WAITING = 100_000  # messages
_LAST_S = 30.0


class Callback:
    """What happens in a job, for programs: override what you need. Any object that has some of these methods will do.

    All methods run in the process that called `elastic.run` (not in a worker), in one thread, in the order of events, shortly after them.
    So they may use whatever that process has, may be slow, and never delay the training; they cannot change it either. An exception is
    reported once on stderr, and the training goes on.

    In a job of several hosts they are called on the host whose agent coordinates the job; when another one takes over, on that one, which
    may repeat the steps of the last second.
    """

    def on_step(self, report: Report) -> None:
        """Called once for each committed step, also if the step is taken again after a loss. The report is that of the leader.

        In a plain loop with several optimizers each update counts as a step here, in `elastic top` and in loggers.
        """

    def on_incident(self, incident: Incident) -> None:
        """Called when a recovery, or a planned change of the members, is over."""

    def on_layout(self, view: Members) -> None:
        """Called for each committed view: workers, stages and hosts from now on."""


class Listener(Protocol):
    """What is told everything that the agent records, in the thread of the audience."""

    def seen(self, message: Mapping[str, Any]) -> None:
        """Handles one message `seen` of `elastic.agent.record`."""
        ...

    def close(self) -> None:
        """Handles the end of the job."""
        ...


class Called:
    """Calls a user's callback. `close` of the object, if it has one, is called when the job has ended."""

    def __init__(self, callback: Any) -> None:
        self._callback = callback

    def seen(self, message: Mapping[str, Any]) -> None:
        what = message["what"]
        if what == "steps":
            for row in message["rows"]:  # one: the audience passes them on one by one
                self._call("on_step", lambda row=row: report_of(Step.from_row(row)))
        elif what == "incident":
            self._call("on_incident", lambda: Incident.from_json(message["incident"]))
        elif what == "view":
            self._call("on_layout", lambda: Members.from_json(message))

    def close(self) -> None:
        close = getattr(self._callback, "close", None)
        if close is not None:
            close()

    def _call(self, name: str, value: Callable[[], Any]) -> None:
        method = getattr(self._callback, name, None)
        if method is not None:
            method(value())


def report_of(step: Step) -> Report:
    """Returns the leader's report of a step."""
    number = lambda value: math.nan if value is None else value  # noqa: E731
    return Report(
        step=step.step,
        loss=number(step.loss),
        lr=step.lr,
        grad_norm=number(step.grad_norm),
        samples_per_second=step.samples_per_second,
        tokens_per_second=step.tokens_per_second,
        epoch=step.epoch,
        workers=step.workers,
        layout=step.layout,
        leader=True,
        stopped=step.stopped,
        skipped=step.skipped,
        mfu=step.mfu,
    )


class Audience:
    """Tells listeners what the agent records, in a thread of its own."""

    def __init__(self, listeners: Sequence[tuple[str, Listener]]) -> None:
        """`listeners` come with what they are called in messages to the user."""
        self._listeners = listeners
        self._messages: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_WAITING)
        self._complained: set[tuple[str, str]] = set()
        self._dropped = False
        self._thread = threading.Thread(target=self._run, name="elastic-callbacks", daemon=True)
        if listeners:
            self._thread.start()

    def put(self, message: Mapping[str, Any]) -> None:
        """Passes on a message of the agent; never waits."""
        if not self._listeners:
            return
        try:
            self._messages.put_nowait(message)
        except queue.Full:
            self._lose()
        if message.get("dropped"):
            self._lose()

    def _lose(self) -> None:
        if not self._dropped:
            self._dropped = True
            say("callbacks and loggers are so slow that they miss steps; the training is not affected")

    def close(self) -> None:
        """Waits until everything is passed on, for half a minute at most."""
        if self._listeners:
            with_room = threading.Thread(target=self._messages.put, args=(None,), daemon=True)
            with_room.start()
            self._thread.join(_LAST_S)
            if self._thread.is_alive():
                say(f"callbacks and loggers have not ended {_LAST_S:.0f} s after the job: what they have not been told is lost")

    def _run(self) -> None:
        while (message := self._messages.get()) is not None:
            for part in [{**message, "rows": [row]} for row in message["rows"]] if message["what"] == "steps" else [message]:
                for name, listener in self._listeners:
                    self._guarded(name, str(message["what"]), lambda each=listener, part=part: each.seen(part))
        for name, listener in self._listeners:
            self._guarded(name, "end", listener.close)

    def _guarded(self, name: str, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # a user's code may raise anything, and must not end this thread
            if (name, what) not in self._complained:
                self._complained.add((name, what))
                say(f"{name} raised {type(error).__name__}: {error}. The training goes on; later errors of this kind are not reported")
