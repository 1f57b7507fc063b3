"""Carries control's requests to the workers of this host, and reports their deaths."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from elastic.agent.crew import Crew
from elastic.agent.looking import Looker
from elastic.agent.supervision import WorkerProcess, how_ended, own_doing, ran_out_of_memory
from elastic.control.carrier import Death
from elastic.errors import SettingsError
from elastic.health.evidence import Observed
from elastic.host.channel import Message
from elastic.host.facts import HostFacts
from elastic.host.rundir import RunDirectory
from elastic.observe import incident, records
from elastic.observe.activity import Doing
from elastic.observe.incident import Incident
from elastic.recovery.inventory import Inventory
from elastic.view import View


class LocalCarrier:
    """The `Carrier` of the workers of this host, `name`, which has room for `room` workers and `spares`."""

    def __init__(
        self, crew: Crew, directory: RunDirectory, name: str = "", room: int = 0, spares: int = 0, facts: HostFacts | None = None
    ) -> None:
        self.name, self.room, self.spares, self.facts = name, room, spares, facts or HostFacts.here()
        self._crew, self._directory = crew, directory
        self._looker = Looker(directory.path)

    @property
    def workers(self) -> Mapping[int, WorkerProcess]:
        """All workers of this host so far."""
        return self._crew.workers

    def fork(self, worker: int, **role: Any) -> None:
        """Starts a worker with this role, see `Crew.fork`."""
        self._crew.fork(worker, **role)

    def freeze(self, modules: dict[str, Any]) -> None:
        """Makes later workers run these modules in their present state."""
        self._crew.freeze(modules)

    def host_of(self, worker: int) -> str:
        return self.name

    def start(self, workers: Iterable[int]) -> None:
        for number in workers:
            self._crew.fork(number)

    def tell(self, workers: Iterable[int], message: Message, segments: Iterable[int] = ()) -> None:
        self._crew.tell(workers, message, segments)

    def tell_all(self, message: Message) -> None:
        """Sends a message to every worker, also to those that are started later."""
        self._crew.tell_all(message)

    def tell_agent(self, message: Message) -> None:
        """Sends nothing: this is the host's agent."""

    def pass_on(self, line: bytes) -> None:
        """Sends nothing: this is the host's agent."""

    def offers(self, workers: Iterable[int]) -> list[Inventory]:
        found = (self._crew.segments.offer(self._crew.workers[number]) for number in workers)
        return [inventory for inventory in found if inventory is not None]

    @property
    def left(self) -> set[int]:
        """The workers of earlier coordinators need not be told of: this agent has their records."""
        return set()

    def may_return(self, workers: Iterable[int]) -> bool:
        return False

    def release(self, workers: Iterable[int]) -> None:
        for worker in workers:
            self._crew.segments.release(worker)

    def end(self, worker: int, why: str) -> None:
        self._crew.kill(worker, why)

    def look(self, workers: Iterable[int]) -> list[Observed]:
        return self._looker.look(self._crew.workers[number] for number in workers)

    def death(self, worker: WorkerProcess) -> Death:
        """Returns the report on a worker whose process has ended, and drops its announcement."""
        return death_of(worker, self.last(worker))

    def last(self, worker: WorkerProcess) -> Doing | None:
        """Returns the last activity of a worker that has ended, as `doing` does, and closes what was open to look at it."""
        doing = self.doing(worker)
        self._looker.forget(worker)
        return doing

    def log(self, found: Incident) -> None:
        records.own.append(self._directory.incidents, [found.to_json()])

    @property
    def logged(self) -> tuple[dict[str, Any], ...]:
        """The incidents in this host's log, as JSON."""
        with suppress(OSError, SettingsError):  # it is for people to read: no reason to end a running job
            return tuple(found.to_json() for found in incident.read(self._directory.incidents))
        return ()

    def replace_log(self, incidents: Iterable[dict[str, Any]]) -> None:
        """Replaces this host's log by the job's."""
        with suppress(OSError):
            self._directory.incidents.unlink(missing_ok=True)
        for found in incidents:
            self.log(Incident.from_json(found))

    def record(self, view: View) -> None:
        self.write(members_of(view, {number: worker.pid for number, worker in self._crew.workers.items()}))

    def write(self, members: dict[str, Any]) -> None:
        """Writes the view's members into the run directory, with the processes of this host."""
        self._directory.write_members({**members, "agent": os.getpid(), "forkserver": self._crew.forkserver})

    def doing(self, worker: WorkerProcess) -> Doing | None:
        """Returns the worker's last activity, None if it left no record in this job."""
        return self._looker.doing(worker)


def death_of(worker: WorkerProcess, doing: Doing | None) -> Death:
    """Returns the report on a worker whose process has ended, with its last activity; drops its announcement."""
    step = worker.step
    if doing is not None:
        worker.epoch, worker.step = doing.epoch, doing.step
    worker.announced = None
    how = how_ended(worker) + (f": {worker.condemned}" if worker.condemned else "")
    own = {"own": own_doing(worker), "no_memory": ran_out_of_memory(worker)}
    return Death(worker=worker.number, how=how, **own, evicted=worker.condemned, lost=worker.lost, step=step, doing=doing)


def members_of(view: View, processes: Mapping[int, int | None]) -> dict[str, Any]:
    """Returns the content of `members.json` that all hosts share; `processes` maps workers to pids on their hosts."""
    members = [
        {"worker": member.worker, "pid": processes.get(member.worker), "host": member.host, "stage": view.plan.stage_of(member.worker)}
        for member in view.members
    ]
    racks = {host: rack for host in sorted({member.host for member in view.members}) if (rack := view.site.racks.get(host)) is not None}
    where = {"coordinator": view.coordinator, "racks": racks, "copies": view.copies}
    return {"epoch": view.epoch, "attempt": view.attempt, "members": members, **where}
