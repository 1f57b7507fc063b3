"""Carries control's requests to the workers of another host, over the link to its agent, and mirrors what that agent reports of them.

    coordinator -> agent   fork {worker, first, joins, workers} | tell {workers, message, segments} | tell_all {message}
                           end {worker, why} | release {workers} | freeze {modules} | record {members} | incident {incident}
                           job {facts} | started {worker} | scaled {workers} | agent {name, address} | drained {}
                           outcome {outcome}
    agent -> coordinator   heard {worker, message, now} | seen {workers, now} | ended {report, now}, see `Ended` | drain {}

No clock of one host is compared with another's: a time in a message is turned into an age when it is sent, and back when it arrives.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from elastic.agent.agent_link import AgentLink
from elastic.agent.carrier import death_of
from elastic.agent.supervision import WorkerProcess
from elastic.control.carrier import Death
from elastic.health.evidence import Observed, Usage
from elastic.host.channel import Message
from elastic.host.facts import HostFacts
from elastic.observe.activity import Doing, Standing
from elastic.observe.incident import Incident
from elastic.recovery.inventory import Inventory

_TIMES = ("at", "committed_at")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An agent's report on a worker whose process has ended: fields of `WorkerProcess`, its last activity, and what its segment holds."""

    worker: int
    status: int | None
    unreaped: bool
    condemned: str
    failure: str
    doing: dict[str, Any] | None
    offer: dict[str, Any] | None


class RemoteCarrier:
    """The `Carrier` of the workers of the host `name`, whose agent is at the other end of `link` and has room for `room` workers and
    `spares`."""

    def __init__(self, link: AgentLink | None, name: str, room: int, spares: int, facts: HostFacts) -> None:
        self.name, self.room, self.spares, self.facts = name, room, spares, facts
        self.workers: dict[int, WorkerProcess] = {}
        self.link = link
        self.returns = False  # whether it is lost, and may come back with what it has in memory
        self._seen: dict[int, tuple[Observed, float]] = {}  # the newest observation of each worker, and when it came
        self._offers: dict[int, Inventory] = {}

    def fork(self, worker: int, **role: Any) -> None:
        """Starts a worker with this role, see `Crew.fork`."""
        self.workers[worker] = WorkerProcess(number=worker)
        self.tell_agent({"type": "fork", "worker": worker, "role": role})

    def freeze(self, modules: dict[str, Any]) -> None:
        """Makes later workers run these modules in their present state."""
        self.tell_agent({"type": "freeze", "modules": modules})

    def tell(self, workers: Iterable[int], message: Message, segments: Iterable[int] = ()) -> None:
        self.tell_agent({"type": "tell", "workers": [*workers], "message": message, "segments": [*segments]})

    def tell_all(self, message: Message) -> None:
        """Sends a message to every worker, also to those that are started later."""
        self.tell_agent({"type": "tell_all", "message": message})

    def tell_agent(self, message: Message) -> None:
        """Sends a message to the host's agent."""
        if self.link is not None:
            self.link.send(message)

    def pass_on(self, line: bytes) -> None:
        """Sends the host's agent a message that was encoded once for many."""
        if self.link is not None:
            self.link.send_line(line)

    def offers(self, workers: Iterable[int]) -> list[Inventory]:
        return [self._offers[worker] for worker in workers if worker in self._offers]

    def release(self, workers: Iterable[int]) -> None:
        workers = [*workers]
        for worker in workers:
            self._offers.pop(worker, None)
        self.tell_agent({"type": "release", "workers": workers})

    def end(self, worker: int, why: str) -> None:
        self.workers[worker].condemned = self.workers[worker].condemned or why
        self.tell_agent({"type": "end", "worker": worker, "why": why})

    def look(self, workers: Iterable[int]) -> list[Observed]:
        workers = [*workers]
        now = time.monotonic()
        found = {worker: self._seen[worker] for worker in workers if worker in self._seen}
        return [
            replace(found[worker][0], age_s=found[worker][0].age_s + now - found[worker][1])
            if worker in found
            else Observed(worker=worker, pid=self.workers[worker].pid)
            for worker in workers
        ]

    def death(self, worker: WorkerProcess) -> Death:
        """Returns the report on a worker whose process has ended."""
        seen = None if worker.lost else self._seen.get(worker.number)
        return death_of(worker, None if seen is None else seen[0].doing)

    def log(self, found: Incident) -> None:
        """Makes the agent append an incident to its log."""
        self.tell_agent({"type": "incident", "incident": found.to_json()})

    def write(self, members: dict[str, Any]) -> None:
        """Makes the agent write the view's members into its run directory."""
        self.tell_agent({"type": "record", "members": members})

    # What the agent reports

    def note_held(self, workers: Iterable[Mapping[str, Any]]) -> None:
        """Notes workers that another coordinator has started."""
        self.workers |= {each["number"]: WorkerProcess(**{**each, "pidfd": -1}) for each in workers}

    def note_left(self, offers: Iterable[dict[str, Any]]) -> None:
        """Notes what the segments of dead workers hold."""
        self._offers |= {offer.worker: offer for offer in map(Inventory.from_json, offers)}

    @property
    def left(self) -> set[int]:
        """The dead workers whose segments hold something."""
        return {*self._offers}

    def may_return(self, workers: Iterable[int]) -> bool:
        return self.returns

    def note_seen(self, message: Message) -> None:
        """Notes which processes the workers have, and what they are doing."""
        now = time.monotonic()
        for each in message["workers"]:
            self.workers[each["worker"]].pid = each["pid"]
            self._seen[each["worker"]] = _observed(each, now - message["now"]), now

    def note_end(self, message: Message) -> WorkerProcess:
        """Notes the end of a worker, and returns its record."""
        report, later = Ended(**message["report"]), time.monotonic() - message["now"]
        worker = self.workers[report.worker]
        worker.gone, worker.status, worker.unreaped = True, report.status, report.unreaped
        worker.condemned, worker.failure = report.condemned, report.failure
        if report.doing is not None:
            doing = Doing(**{**report.doing, "at": report.doing["at"] + later})
            self._seen[report.worker] = Observed(worker=report.worker, pid=worker.pid, doing=doing), time.monotonic()
        if report.offer is not None:
            self._offers[report.worker] = Inventory.from_json(report.offer)
        return worker

    def lose(self, why: str, *, may_return: bool = False) -> list[WorkerProcess]:
        """Notes that the host is lost, and whether it may come back; returns the records of its workers that had not ended."""
        self.returns = may_return
        lost = [worker for worker in self.workers.values() if not worker.ended]
        for worker in lost:
            worker.gone, worker.unreaped, worker.lost = True, True, why
        self._offers.clear()
        return lost


def aged(message: Message, by: float) -> Message:
    """Returns a worker's message with all times moved by `by` seconds."""
    moved = {name: message[name] + by for name in _TIMES if message.get(name) is not None}
    if message.get("times"):
        moved["times"] = {name: at + by for name, at in message["times"].items()}
    return {**message, **moved} if moved else message


def observations(seen: Iterable[Observed]) -> list[dict[str, Any]]:
    """Returns observations as JSON."""
    return [{name: _plain(getattr(each, name)) for name in _fields(Observed)} for each in seen]


@cache
def _fields(kind: type) -> tuple[str, ...]:
    return tuple(each.name for each in fields(kind))


def _plain(value: Any) -> Any:
    """Returns a part of an observation as JSON; `asdict` would copy every value deeply, five times a second for each worker."""
    return {name: getattr(value, name) for name in _fields(type(value))} if isinstance(value, Doing | Standing | Usage) else value


def _observed(data: Mapping[str, Any], later: float) -> Observed:
    """Returns an observation from JSON; its times are moved by `later` seconds, to this host's clock."""
    doing, standing, usage = data["doing"], data["standing"], data["usage"]
    if doing is not None:
        doing = Doing(**{**doing, "at": doing["at"] + later})
    if standing is not None:
        standing = Standing(**{**standing, "place_at": standing["place_at"] + later, "waits_at": standing["waits_at"] + later})
    return Observed(**{**data, "doing": doing, "standing": standing, "usage": None if usage is None else Usage(**usage)})
