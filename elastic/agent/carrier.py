"""Carries control's requests to the workers of this host, and reports their deaths."""

from __future__ import annotations

import os
from collections.abc import Iterable

from elastic.agent.crew import Crew
from elastic.agent.looking import Looker
from elastic.agent.supervision import WorkerProcess, how_ended, own_doing
from elastic.control.carrier import Death
from elastic.health.evidence import Observed
from elastic.host.channel import Message
from elastic.host.rundir import RunDirectory
from elastic.recovery.inventory import Inventory
from elastic.view import View


class LocalCarrier:
    """The `Carrier` of a job whose workers all run on this host."""

    def __init__(self, crew: Crew, directory: RunDirectory) -> None:
        self._crew, self._directory = crew, directory
        self._looker = Looker(directory.path)

    def start(self, workers: Iterable[int]) -> None:
        for number in workers:
            self._crew.fork(number)

    def tell(self, workers: Iterable[int], message: Message, segments: Iterable[int] = ()) -> None:
        self._crew.tell(workers, message, segments)

    def offers(self, workers: Iterable[int]) -> list[Inventory]:
        found = (self._crew.segments.offer(self._crew.workers[number]) for number in workers)
        return [inventory for inventory in found if inventory is not None]

    def release(self, workers: Iterable[int]) -> None:
        for worker in workers:
            self._crew.segments.release(worker)

    def end(self, worker: int, why: str) -> None:
        self._crew.kill(worker, why)

    def look(self, workers: Iterable[int]) -> list[Observed]:
        return self._looker.look(self._crew.workers[number] for number in workers)

    def death(self, worker: WorkerProcess) -> Death:
        """Returns the report on a worker whose process has ended, and drops its announcement."""
        doing, step = self._looker.doing(worker), worker.step
        self._looker.forget(worker.number)
        if doing is not None:
            worker.epoch, worker.step = doing.epoch, doing.step
        worker.announced = None
        how = how_ended(worker) + (f": {worker.condemned}" if worker.condemned else "")
        return Death(worker=worker.number, how=how, own=own_doing(worker), evicted=worker.condemned, step=step, doing=doing)

    def record(self, view: View) -> None:
        processes = {number: worker.pid for number, worker in self._crew.workers.items()}
        members = [
            {
                "worker": member.worker,
                "pid": processes[member.worker],
                "host": member.host,
                "stage": view.plan.stage_of(member.worker),
            }
            for member in view.members
        ]
        self._directory.write_members(
            {
                "epoch": view.epoch,
                "attempt": view.attempt,
                "members": members,
                "coordinator": view.coordinator,
                "agent": os.getpid(),
                "forkserver": self._crew.forkserver,
            }
        )
