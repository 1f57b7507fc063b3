"""Finds what only some workers do: a collective that others have gone past, or a loop that others are still in. All would wait for ever.

A worker that waits for others for long tells the agent where, again and again (`Waiting`). Where one waits in something that all must call
behind step k, such as an evaluation, and another one computes step k + 1 in the same view, the second has left the loop body of step k
without calling it. That is no matter of time: the waits need only be long enough that nothing is on its way any more.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from elastic.worker.job import Job

_EVERY_S, _LONG_S = 1.0, 2.0
_TIMES = 4  # a wait is told so often before it counts
_TOGETHER = (
    "A loop must be left behind the same step on every worker: decide by what all of them see, such as report.loss or trainer.evaluate"
)
_WORKER = os.path.dirname(os.path.abspath(__file__))
_HERE = os.path.dirname(_WORKER) + os.sep
_TRAINER = os.path.join(_WORKER, "trainer.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Where a worker waits in an epoch: it `computes` step `step`, or takes part in `what` behind it. `number` is the wait's own.

    `leaves`: its loop was left behind that step, `train_fn` has returned, and the state is to be saved.
    """

    epoch: int
    step: int
    computes: bool
    number: int
    what: str = ""
    leaves: bool = False


class Waiting:
    """Tells where this worker waits, if it does so for long."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._now: tuple[Wait, float] | None = None
        self._number = 0
        self._thread: threading.Thread | None = None

    @contextmanager
    def at(self, epoch: int, step: int, *, computes: bool, leaves: bool = False) -> Iterator[None]:
        """Whatever is done meanwhile waits for others."""
        self._number += 1
        wait = Wait(epoch=epoch, step=step, computes=computes, number=self._number, leaves=leaves)
        before, self._now = self._now, (wait, time.monotonic())
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
        """Says where `thread` waits, if it does."""
        now = self._now
        if now is not None and time.monotonic() - now[1] >= _LONG_S:
            self._job.send({"type": "waits", "wait": {**asdict(now[0]), "what": _called(thread)}})


def _tell(waiting: weakref.ref[Waiting], thread: int) -> None:
    while (held := waiting()) is not None:
        held.tell(thread)
        del held
        time.sleep(_EVERY_S)


def _called(thread: int) -> str:
    """What the user's code has called in this thread, and where."""
    frame = sys._current_frames().get(thread)
    while frame is not None and (behind := frame.f_back) is not None:
        if frame.f_code.co_filename == _TRAINER and not behind.f_code.co_filename.startswith(_HERE):
            return f"trainer.{frame.f_code.co_name}() ({os.path.basename(behind.f_code.co_filename)}:{behind.f_lineno})"
        frame = behind
    return "something of a Trainer"


class OneSided:
    """What the agent knows of waits."""

    def __init__(self) -> None:
        self._waits: dict[int, tuple[Wait, int]] = {}

    def heard(self, worker: int, wait: Wait) -> None:
        """One more word of it."""
        before = self._waits.get(worker)
        times = before[1] + 1 if before is not None and before[0].number == wait.number else 1
        self._waits[worker] = (wait, times)

    def verdict(self, epoch: int, members: Collection[int], returned: Collection[int]) -> str | None:
        """Who waits in vain, if anybody does. Members of the view of `epoch` are looked at; these have `returned` from train_fn."""
        long = {
            worker: wait for worker, (wait, times) in self._waits.items() if times >= _TIMES and worker in members and wait.epoch == epoch
        }
        said = _without_the_others(long) or _behind_their_backs(long, [worker for worker in members if worker in returned])
        return said and said + advice(epoch)


def _without_the_others(waits: Mapping[int, Wait]) -> str | None:
    for worker, wait in waits.items():
        gone = [other for other, theirs in waits.items() if theirs.computes and theirs.step > wait.step]
        if wait.leaves and gone:
            return (
                f"worker {worker} has left the loop behind step {wait.step} and returned from train_fn, and {_listed(gone)} gone on to "
                f"step {waits[gone[0]].step}. {_TOGETHER}"
            )
        if not wait.computes and gone:
            return (
                f"worker {worker} waits in {wait.what} behind step {wait.step}, and {_listed(gone)} gone on to step {waits[gone[0]].step} "
                "without it. Every worker must call it, at the same place: not under `if report.leader`, which is for what is done "
                "with the result"
            )
    return None


def _behind_their_backs(waits: Mapping[int, Wait], returned: Collection[int]) -> str | None:
    for worker, wait in waits.items():
        if returned:
            where = f"step {wait.step}" if wait.computes else f"{wait.what} behind step {wait.step}"
            return f"{_listed(returned)} returned from train_fn, and worker {worker} waits in {where} for all workers. {_TOGETHER}"
    return None


def advice(epoch: int) -> str:
    """What may be the reason that workers do not do the same, where the members have changed since the first epoch."""
    if epoch < 2:
        return ""
    return (
        ". A worker that joined has its own counters of the loop (early stopping, an epoch) as train_fn begins with them, unless they "
        "are given to trainer.register_for_checkpointing"
    )


def _listed(workers: Collection[int]) -> str:
    return f"worker{'s' * (len(workers) > 1)} {', '.join(map(str, workers))} {'have' if len(workers) > 1 else 'has'}"
