"""Detects calls that only some workers make: a collective that others skipped, or a loop that others are still in. All would wait for ever.

A worker that waits for others for long reports to the agent where, repeatedly (`WaitReporter`). If one waits in a collective call after
step k, such as an evaluation, and another computes step k + 1 in the same view, the second has left the loop body of step k without the
call. The same holds if two workers wait in different calls of the same number after a step. This does not depend on speed: the waits must
only be long enough that no message is still on its way.

A worker that is in the user's code for long reports where too: that is no error, but explains why the others wait.
"""

from __future__ import annotations

import os
import sysconfig
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from types import FrameType
from typing import Any

from elastic.host.frames import stack_of
from elastic.worker.job import Job

_EVERY_S, _LONG_S = 1.0, 2.0
_TIMES = 4  # reports of a wait before it counts
_TIMES_BUSY = 8  # reports of user code before it is named
_EVERY = "Every worker must call it, at the same place: not under `if report.leader`, which is for using the result"
_TOGETHER = (
    "A loop must be left after the same step on every worker: decide by a value that all have, such as report.loss, or the Trainer's "
    "evaluate()"
)
_WORKER = os.path.dirname(os.path.abspath(__file__))
_HERE = os.path.dirname(_WORKER) + os.sep
_LIBRARY = sysconfig.get_paths()["stdlib"] + os.sep
_TRAINERS = {os.path.join(_WORKER, "trainer.py"): "trainer", os.path.join(_WORKER, "plain", "loader.py"): "loader"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """A worker's wait in an epoch: it `computes` step `step`, or takes part in the call `what` after it. `number` identifies the wait.

    `leaves`: its loop was left after that step, `train_fn` has returned, and the state must be saved. `call` numbers the collective calls
    after the step. `loose`: others may already have finished the call, with data for this worker still on its way. `busy`: it does not
    wait, but runs the user's code at `what`. `closes`: it waits until the step is complete everywhere, as at a loop's end. `calls` of a
    worker that `computes`: how many it has made after the step before; of another one: how many before this one.
    """

    epoch: int
    step: int
    computes: bool
    number: int
    what: str = ""
    leaves: bool = False
    call: str = ""
    loose: bool = False
    busy: bool = False
    closes: bool = False
    calls: int = 0

    @property
    def called(self) -> str:
        """The name of the call, without its place in the code."""
        if self.closes and not self.leaves:
            return "closes"
        return "leaves" if self.leaves else self.what.partition(" ")[0]


class WaitReporter:
    """Reports to the agent where this worker waits, if it does so for long."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._now: tuple[Wait, float] | None = None
        self._last: Wait | None = None
        self._busy: tuple[int, float] = (0, 0.0)  # the wait after which the user's code was first seen, and when
        self._number = 0
        self._code = ""
        self._thread: threading.Thread | None = None

    @contextmanager
    def at(self, epoch: int, step: int, *, computes: bool, **told: Any) -> Iterator[None]:
        """Marks the enclosed code as a wait for others. `told` are further fields of the `Wait`."""
        self._number += 1
        wait = Wait(epoch=epoch, step=step, computes=computes, number=self._number, **told)
        before, self._now, self._last = self._now, (wait, time.monotonic()), wait
        if self._thread is None:
            self._thread = threading.Thread(
                target=_tell, args=(weakref.ref(self), threading.get_ident()), name="elastic-waiting", daemon=True
            )
            self._thread.start()
        try:
            yield
        finally:
            self._now = before

    def tell(self, thread: int) -> None:
        """Reports where `thread` waits, or is in the user's code, if it does so for long."""
        self._job.pulse()
        now, last = self._now, self._last
        if now is None and last is not None and self._busy[0] != last.number:
            self._busy = last.number, time.monotonic()
        since = self._busy[1] if now is None else now[1]
        if last is None or time.monotonic() - since < _LONG_S:
            return
        stack = stack_of(thread)  # read only now, since it creates objects for running frames
        called = _called(stack)
        self._tell_code(_users(stack))
        if now is not None:
            self._job.send({"type": "waits", "wait": {**asdict(now[0]), "what": called or "a Trainer's call"}})
        elif called is None and (where := _users(stack)):
            self._job.send({"type": "waits", "wait": {**asdict(last), "busy": True, "what": where}})

    def _tell_code(self, where: str) -> None:
        """Reports the user's line that is running, if it is another one than before."""
        if where != self._code:
            self._code = where
            self._job.send({"type": "code", "code": where.strip("()")})


def _tell(waiting: weakref.ref[WaitReporter], thread: int) -> None:
    while (held := waiting()) is not None:
        held.tell(thread)
        del held
        time.sleep(_EVERY_S)


def _called(stack: Sequence[FrameType]) -> str | None:
    """Returns the Trainer's method that the user's code has called, and where; None if there is none on this stack."""
    for frame, behind in pairwise(stack):
        owner = _TRAINERS.get(frame.f_code.co_filename)
        if owner is not None and not behind.f_code.co_filename.startswith(_HERE):
            return f"{owner}.{frame.f_code.co_name}() {_place(behind)}"
    return None


def _users(stack: Sequence[FrameType]) -> str:
    """Returns the user's line that is running; empty if train_fn has returned."""
    for frame in stack:
        file = frame.f_code.co_filename
        if "site-packages" not in file and not file.startswith((_HERE, _LIBRARY, "<frozen")):
            return _place(frame)
    return ""


def _place(frame: FrameType) -> str:
    return f"({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


class OneSided:
    """The agent's record of workers' waits."""

    def __init__(self) -> None:
        self._waits: dict[int, tuple[Wait, int]] = {}
        self._said: set[tuple[int, int]] = set()

    def heard(self, worker: int, wait: Wait) -> None:
        """Records a report of a wait."""
        before = self._waits.get(worker)
        same = before is not None and (before[0].number, before[0].busy) == (wait.number, wait.busy)
        times = before[1] + 1 if before is not None and same else 1
        self._waits[worker] = (wait, times)

    def verdict(self, epoch: int, members: Collection[int], returned: Collection[int]) -> str | None:
        """Returns a sentence about a member that waits in vain, else None. The workers `returned` have returned from train_fn."""
        long = {worker: wait for worker, wait in self._long(epoch, members, _TIMES).items() if not wait.busy}
        gone = [worker for worker in members if worker in returned]
        said = _without_the_others(long) or _in_another_call(long) or _after_return(long, gone)
        return said and said + advice(epoch)

    def waited_for(self, epoch: int, members: Collection[int], returned: Collection[int]) -> list[str]:
        """Returns a sentence for each worker that is in the user's code for long while others wait, unless it was returned before."""
        waiting = [worker for worker, wait in self._long(epoch, members, _TIMES).items() if not wait.busy]
        busy = {worker: wait for worker, wait in self._long(epoch, members, _TIMES_BUSY).items() if wait.busy and worker not in returned}
        told = []
        for worker, wait in busy.items():
            if waiting and (worker, wait.number) not in self._said:
                self._said.add((worker, wait.number))
                where = f"after step {wait.step}" if wait.step >= 0 else "before the first step"
                told.append(
                    f"worker {worker} is in the code of train_fn {where} {wait.what} for over {_TIMES_BUSY * _EVERY_S:.0f} s, "
                    f"and {_waits(waiting)} for it"
                )
        return told

    def _long(self, epoch: int, members: Collection[int], least: int) -> dict[int, Wait]:
        return {
            worker: wait for worker, (wait, times) in self._waits.items() if times >= least and worker in members and wait.epoch == epoch
        }


def _without_the_others(waits: Mapping[int, Wait]) -> str | None:
    for worker, wait in waits.items():
        gone = [other for other, theirs in waits.items() if theirs.computes and theirs.step > wait.step]
        if wait.leaves and gone:
            return (
                f"worker {worker} has left the loop after step {wait.step} and returned from train_fn, and {_listed(gone)} gone on to "
                f"step {waits[gone[0]].step}. {_TOGETHER}"
            )
        if wait.loose:  # who has made the call may have gone on, with data for this worker still on its way
            gone = [other for other in gone if (waits[other].step, waits[other].calls) <= (wait.step + 1, wait.calls)]
        if not wait.computes and gone:
            return (
                f"worker {worker} waits in {wait.what} after step {wait.step}, and {_listed(gone)} gone on to step {waits[gone[0]].step} "
                f"without it. {_EVERY}"
            )
    return None


def _in_another_call(waits: Mapping[int, Wait]) -> str | None:
    for worker, wait in waits.items():
        for other, theirs in waits.items():
            if wait.computes or theirs.computes or (wait.step, wait.call) != (theirs.step, theirs.call) or wait.called == theirs.called:
                continue
            where = f"after step {wait.step}" if wait.step >= 0 else "before the first step"
            if theirs.leaves:
                return f"worker {worker} waits in {wait.what} {where}, and worker {other} has returned from train_fn without it. {_EVERY}"
            if not wait.leaves:
                return (
                    f"worker {worker} waits in {wait.what} {where}, and worker {other} in {theirs.what}. All workers must make the "
                    "same calls, in the same order: each waits for the others"
                )
    return None


def _after_return(waits: Mapping[int, Wait], returned: Collection[int]) -> str | None:
    for worker, wait in waits.items():
        if returned:
            where = f"step {wait.step}" if wait.computes else f"{wait.what} after step {wait.step}"
            return f"{_listed(returned)} returned from train_fn, and worker {worker} waits in {where} for all workers. {_TOGETHER}"
    return None


def advice(epoch: int) -> str:
    """Returns a likely reason why workers call different things after the members have changed; empty in the first epoch."""
    if epoch < 2:
        return ""
    return (
        ". On a worker that joined, the loop's own counters (early stopping, an epoch) have their values from the start of train_fn, "
        "unless they are given to register_for_checkpointing (of the Trainer, or of the loader)"
    )


def _waits(workers: Collection[int]) -> str:
    return f"worker{'s' * (len(workers) > 1)} {', '.join(map(str, workers))} wait{'s' * (len(workers) == 1)}"


def _listed(workers: Collection[int]) -> str:
    return f"worker{'s' * (len(workers) > 1)} {', '.join(map(str, workers))} {'have' if len(workers) > 1 else 'has'}"
