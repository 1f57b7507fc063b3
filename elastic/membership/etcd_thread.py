"""A thread that runs a loop's etcd tasks one after another, and retries them, up to a deadline, while etcd is unavailable."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elastic.errors import Conflict, ElasticError, EtcdRefused, EtcdUnavailable, JobFailed

RETRY_S = 0.2
TOLD_S = (0.0, 10.0, 30.0)  # seconds into an outage at which it is reported; then every minute
DEADLINE_S = 600.0  # how long a task waits for etcd
_STOP_S = 1.0  # a call that etcd does not answer takes longer, and its result is no longer needed


def _ignore(_: Any) -> None:
    """Ignores the result of a task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdTask:
    """A task at etcd. `call` is retried until it returns (to `done`), raises Conflict (to `refused`), or `wanted` is False.

    A task that is not `needed` is tried once, and its failure is ignored. After `deadline_s` of an outage the job fails. `waits` names, for
    the user, what waits for etcd in an outage, where it is not the recovery or planned change of a running job.
    """

    call: Callable[[], Any]
    done: Callable[[Any], None] = _ignore
    refused: Callable[[Conflict], None] = _ignore
    wanted: Callable[[], bool] = lambda: True
    needed: bool = True
    deadline_s: float = DEADLINE_S
    waits: str = ""


class EtcdThread:
    """Runs tasks in order; every callback goes to the loop's thread through `post`.

    In an outage, with its seconds: `unanswered` is called at each failed try of a needed task; `away` now and then, also with what waits;
    `back` when it ends. `failed` gets errors that a retry cannot change: etcd refuses permanently or was away until the deadline, the name
    is lost or taken, or a bug.
    """

    def __init__(
        self,
        post: Callable[[Callable[[], None]], None],
        away: Callable[[EtcdUnavailable, float, str], None],
        back: Callable[[], None],
        failed: Callable[[ElasticError], None],
        clock: Callable[[], float] = time.monotonic,
        unanswered: Callable[[EtcdUnavailable, float], None] = lambda error, seconds: None,
    ) -> None:
        self._post = post
        self._away = away
        self._back = back
        self._failed = failed
        self._clock = clock
        self._unanswered = unanswered
        self._tasks: queue.SimpleQueue[EtcdTask | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elastic-etcd", daemon=True)
        self._thread.start()

    def run(self, task: EtcdTask) -> None:
        """Queues a task; does not wait for it."""
        self._tasks.put(task)

    def stop(self) -> None:
        """Stops the thread; queued tasks are not run."""
        self._stopped.set()
        self._tasks.put(None)
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None and not self._stopped.is_set():
            try:
                self._do(task)
            except ElasticError as error:
                self._post(lambda error=error: self._failed(error))
            except Exception:  # the thread's boundary: otherwise a recovery would wait for it for ever
                bug = JobFailed(f"the agent's thread for etcd failed, so the job ends; this is a bug:\n{traceback.format_exc()}")
                self._post(lambda bug=bug: self._failed(bug))

    def _do(self, task: EtcdTask) -> None:
        began, reports, outage = self._clock(), 0, False
        while task.wanted() and not self._stopped.is_set():
            try:
                result = task.call()
            except EtcdRefused:
                if task.needed:
                    raise
                break
            except EtcdUnavailable as error:
                if not task.needed:
                    break
                seconds, outage = self._clock() - began, True
                if seconds > task.deadline_s:
                    self._post(lambda error=error: self._failed(_given_up(error, task.waits)))
                    return
                due = seconds >= _due(reports)
                reports += due
                self._post(lambda error=error, seconds=seconds, due=due: self._failing(task, error, seconds, due=due))
                self._stopped.wait(RETRY_S)
                continue
            except Conflict as error:
                self._post(lambda error=error: task.refused(error))
            else:
                self._post(lambda result=result: task.done(result))
            break
        if outage and not self._stopped.is_set():
            self._post(self._back)

    def _failing(self, task: EtcdTask, error: EtcdUnavailable, seconds: float, *, due: bool) -> None:
        if due:
            self._away(error, seconds, task.waits)
        self._unanswered(error, seconds)


def _due(reports: int) -> float:
    """Returns the seconds into an outage at which it is reported next, after so many reports."""
    return TOLD_S[reports] if reports < len(TOLD_S) else 60.0 * (reports - len(TOLD_S) + 1)


def _given_up(error: EtcdUnavailable, waits: str) -> EtcdUnavailable:
    waiting, ends = (waits, "this host gives up") if waits else ("the job's recovery", "the job ends")
    return EtcdUnavailable(f"{error}; {waiting} waited {DEADLINE_S / 60:.0f} minutes for etcd, so {ends}")
