"""The hosts of a job, as its coordinator sees them: which worker runs where, and the `Carrier` to all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from elastic.agent.carrier import members_of
from elastic.agent.remote_carrier import RemoteCarrier
from elastic.agent.supervision import WorkerProcess
from elastic.control.carrier import Carrier, Death
from elastic.health.evidence import Observed
from elastic.host.channel import Message, encoded
from elastic.host.facts import HostFacts
from elastic.observe.incident import Incident
from elastic.recovery.inventory import Inventory
from elastic.view import View


class HostCarrier(Protocol):
    """The workers of one host, on which there is `room` for so many members, and for so many `spares`."""

    name: str
    room: int
    spares: int
    facts: HostFacts

    @property
    def workers(self) -> Any: ...
    def fork(self, worker: int, **role: Any) -> None: ...
    def freeze(self, modules: dict[str, Any]) -> None: ...
    def tell(self, workers: Iterable[int], message: Message, segments: Iterable[int] = ()) -> None: ...
    def tell_all(self, message: Message) -> None: ...
    def tell_agent(self, message: Message) -> None: ...
    def pass_on(self, line: bytes) -> None: ...
    @property
    def left(self) -> set[int]: ...
    def offers(self, workers: Iterable[int]) -> list[Inventory]: ...
    def may_return(self, workers: Iterable[int]) -> bool: ...
    def release(self, workers: Iterable[int]) -> None: ...
    def end(self, worker: int, why: str) -> None: ...
    def look(self, workers: Iterable[int]) -> list[Observed]: ...
    def death(self, worker: WorkerProcess) -> Death: ...
    def log(self, found: Incident) -> None: ...
    def write(self, members: dict[str, Any]) -> None: ...


class AbsentHost(RemoteCarrier):
    """A host whose agent is gone, with one of its workers."""

    def __init__(self, name: str, worker: int, why: str) -> None:
        super().__init__(None, name, 0, 0, HostFacts(processors=1))
        self.returns = True  # as far as this agent knows
        gone = WorkerProcess(number=worker, gone=True, unreaped=True, lost=f"{name}: {why}")
        self.workers[worker] = gone


class Hosts(Carrier):
    """All hosts; the first is this one. Requests for workers of hosts that are lost are dropped."""

    def __init__(self, local: HostCarrier) -> None:
        self.local = local
        self.present: dict[str, HostCarrier] = {local.name: local}
        self.draining: set[str] = set()  # hosts that leave
        self.limit: int | None = None  # the number of workers that the user asked for
        self.wanted: int | None = None  # the number of workers that the job was founded with
        self.most = 0  # so many members there has been room for: spares make up for hosts that are gone
        self._hosts: dict[int, HostCarrier] = dict.fromkeys(local.workers, local)  # of all workers so far
        self._standing: list[Message] = []
        self._frozen: dict[str, Any] | None = None

    @property
    def room(self) -> int:
        """How many workers the job should have: up to `limit`, or as many as there was room for, as long as spares make up for others."""
        wanted = max(self.most, sum(host.room for host in self._staying)) if self.limit is None else self.limit
        return min(wanted, self.capacity)

    @property
    def capacity(self) -> int:
        """How many processes the hosts that stay have, if spares become members."""
        return sum(host.room + host.spares for host in self._staying)

    @property
    def spares(self) -> int:
        """How many spares the job should have."""
        return min(sum(host.spares for host in self._staying), self.capacity - self.room)

    @property
    def rooms(self) -> dict[str, int]:
        """The room for members on each host that stays."""
        return {host.name: host.room for host in self._staying}

    @property
    def _staying(self) -> list[HostCarrier]:
        return [host for host in self.present.values() if host.name not in self.draining]

    def workers_of(self, host: str) -> list[int]:
        """Returns the workers of a host that have not ended."""
        return [number for number, worker in self.present[host].workers.items() if not worker.ended]

    def worker(self, number: int) -> WorkerProcess:
        """Returns the record of a worker, living or dead."""
        return self._hosts[number].workers[number]

    @property
    def workers(self) -> dict[int, WorkerProcess]:
        """The records of all workers so far."""
        return {number: host.workers[number] for number, host in self._hosts.items()}

    def host_of(self, worker: int) -> str:
        return self._hosts[worker].name

    def add(self, host: HostCarrier) -> None:
        """Adds a host, with the workers that it has, and on which others can be started."""
        self.present[host.name] = host
        self._hosts |= dict.fromkeys(host.workers, host)
        self._take_back(host)
        if self._frozen is not None:
            host.freeze(self._frozen)
        for message in self._standing:
            host.tell_all(message)

    def _take_back(self, host: HostCarrier) -> None:
        """Connects what a host has left of workers that were lost with it; frees what is of others."""
        known = {worker for worker in host.left if worker in self._hosts and self._hosts[worker].name == host.name}
        host.release(host.left - known)
        for worker in known - host.workers.keys():
            record = self._hosts[worker].workers[worker]
            host.workers[worker] = record
            self._hosts[worker] = host

    def remove(self, host: HostCarrier) -> None:
        """Removes a host that is lost or has left; the records of its workers remain. It may have come back already."""
        if self.present.get(host.name) is host:
            del self.present[host.name]
            self.draining.discard(host.name)

    def freeze(self, modules: dict[str, Any]) -> None:
        """Makes later workers of every host run these modules in their present state."""
        self._frozen = modules
        self.local.freeze(modules)
        self.tell_agents({"type": "freeze", "modules": modules})

    def fork(self, worker: int, host: str, *, first: bool = False, joins: bool = True) -> None:
        """Starts a worker on a host; `first` and `joins` are as in `Crew.fork`. Call `starting` with its number before."""
        self._hosts[worker] = self.present[host]
        self.present[host].fork(worker, first=first, joins=joins, workers=self.wanted)

    def starting(self, last: int) -> None:
        """Tells the other agents that workers with new numbers up to `last` are started: no later coordinator may use these again."""
        self.tell_agents({"type": "started", "worker": last})

    def miss(self, worker: int, host: str, why: str) -> None:
        """Notes that a worker is lost, unless one of the hosts has it; `why` says what is known of its host."""
        if worker not in self._hosts:
            self._hosts[worker] = AbsentHost(host, worker, why)

    def tell_agents(self, message: Message) -> None:
        """Sends a message to the agents of the other hosts."""
        line = encoded(message)
        self.each(lambda host: host.pass_on(line))

    def start(self, workers: Iterable[int]) -> None:
        workers = [*workers]
        self.starting(max(workers, default=-1))
        for worker in workers:
            self.fork(worker, self.emptiest())

    def emptiest(self) -> str:
        """Returns the host with room for most further workers."""
        return max(self._staying or self.present.values(), key=self._free).name

    def _free(self, host: HostCarrier) -> int:
        return host.room + host.spares - sum(not worker.ended for worker in host.workers.values())

    def tell(self, workers: Iterable[int], message: Message, segments: Iterable[int] = ()) -> None:
        theirs = self._by_host(segments)
        for name, numbers in self._by_host(workers).items():
            self.present[name].tell(numbers, message, theirs.get(name, ()))

    def tell_all(self, message: Message) -> None:
        """Sends a message to every worker, also to those that are started later."""
        self._standing.append(message)
        self.local.tell_all(message)
        self.tell_agents({"type": "tell_all", "message": message})

    def offers(self, workers: Iterable[int]) -> list[Inventory]:
        return [offer for name, numbers in self._by_host(workers).items() for offer in self.present[name].offers(numbers)]

    def may_return(self, workers: Iterable[int]) -> bool:
        away = {self._hosts[worker] for worker in workers if worker in self._hosts}.difference(self.present.values())
        return any(host.may_return(workers) for host in away)

    def release(self, workers: Iterable[int]) -> None:
        for name, numbers in self._by_host(workers).items():
            self.present[name].release(numbers)

    def end(self, worker: int, why: str) -> None:
        for name in self._by_host([worker]):
            self.present[name].end(worker, why)

    def look(self, workers: Iterable[int]) -> list[Observed]:
        return [seen for name, numbers in self._by_host(workers).items() for seen in self.present[name].look(numbers)]

    def death(self, worker: WorkerProcess) -> Death:
        """Returns the report on a worker whose process has ended."""
        host = self._hosts[worker.number]
        worker.host = host.name if len({each.name for each in self._hosts.values()}) > 1 else ""
        return host.death(worker)

    def log(self, found: Incident) -> None:
        self.local.log(found)
        self.tell_agents({"type": "incident", "incident": found.to_json()})

    def record(self, view: View) -> None:
        members = members_of(view, {number: worker.pid for number, worker in self.workers.items()})
        self.local.write(members)
        self.tell_agents({"type": "record", "members": members})

    def each(self, act: Callable[[HostCarrier], None]) -> None:
        """Calls `act` with every host."""
        for host in list(self.present.values()):
            act(host)

    def _by_host(self, workers: Iterable[int]) -> dict[str, list[int]]:
        """Returns the workers of each present host."""
        found: dict[str, list[int]] = {}
        for worker in workers:
            if worker in self._hosts and self.present.get(self._hosts[worker].name) is self._hosts[worker]:
                found.setdefault(self._hosts[worker].name, []).append(worker)
        return found
