"""The view: the numbered, agreed list of members, with the plan and the layout that they follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from elastic.errors import SettingsError
from elastic.layout.layout import Layout, spread
from elastic.layout.regions import ModelSpec
from elastic.plan.fleet import Fleet
from elastic.plan.plan import Plan
from elastic.plan.site import Site
from elastic.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One worker of the job: its id (never reused), its host's name, and the address at which it accepts links.

    It computes a layer in `slowdown` times the workload's time. Its process may use `memory` bytes (None: its share of the host's);
    it uses `base` of them before it holds a layer. `segment`: its state lies in memory of its host's agent, and outlives its process. It
    computes on a `device` of this kind: if that is not "cpu", only copies of its state lie there, and no other process can read the rest.
    It may use `device_memory` bytes of the device; None if it has none, or nobody knows.
    """

    worker: int
    host: str
    address: str
    slowdown: float = 1.0
    memory: int | None = None
    base: int = 0
    segment: bool = False
    device: str = "cpu"
    device_memory: int | None = None

    def to_json(self) -> list[Any]:
        """One flat list, in the order of the fields."""
        own = [self.worker, self.host, self.address, self.slowdown, self.memory, self.base, self.segment]
        return [*own, self.device, self.device_memory]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Member:
        """The inverse of `to_json`."""
        worker, host, address, slowdown, memory, base, segment, device, device_memory = data
        return cls(
            worker=worker,
            host=host,
            address=address,
            slowdown=slowdown,
            memory=memory,
            base=base,
            segment=segment,
            device=device,
            device_memory=device_memory,
        )


def outlives(members: Iterable[Member]) -> bool:
    """Returns whether every member's state outlives its process, so that only the loss of a host can lose it."""
    return all(member.segment for member in members)


def apart(members: Iterable[Member], site: Site) -> dict[int, str]:
    """Returns for each member the rack, or else the host, on which no copy of its state is kept, see `Site.apart`."""
    return site.apart({member.worker: member.host for member in members})


def laid_out(
    model: ModelSpec, stages: Sequence[tuple[range, Sequence[int]]], members: Sequence[Member], site: Site, near: Layout | None = None
) -> Layout:
    """Returns the layout of these stages, with as many copies as the site wants and its hosts allow; see `spread`."""
    hosts = {member.worker: member.host for member in members}
    return spread(model, stages, apart(members, site), near, outlive=outlives(members), copies=site.copies, hosts=hosts)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Epoch `epoch`, committed in attempt `attempt`. A member's place is its index in `members`; the member at place 0 coordinates.

    Raises SettingsError if there is no member, a member occurs twice, or the plan names a worker that is not a member.
    """

    epoch: int
    attempt: int
    members: tuple[Member, ...]
    plan: Plan
    layout: Layout
    workload: Workload
    site: Site = field(default_factory=Site)
    workers: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """The ids of the members, in the order of their places."""

    def __post_init__(self) -> None:
        workers = tuple(member.worker for member in self.members)
        object.__setattr__(self, "workers", workers)  # it is read for each of thousands of transfers
        if not workers or len(set(workers)) < len(workers):
            raise SettingsError(f"a view needs at least one member and each only once, not {workers}")
        if strangers := set(self.plan.workers).difference(workers):
            raise SettingsError(f"the plan of epoch {self.epoch} names workers {sorted(strangers)}, which are not members {workers}")

    @property
    def coordinator(self) -> int:
        """The worker at place 0."""
        return self.members[0].worker

    @property
    def slowdowns(self) -> dict[int, float]:
        """The slowdown of each member, by worker."""
        return {member.worker: member.slowdown for member in self.members}

    @property
    def fleet(self) -> Fleet:
        """The members in the planner's form."""
        return Fleet.of(self.members, self.site)

    @property
    def peak_flops(self) -> float:
        """The most floating-point operations a second of all members, as many as their hosts' processors can run; 0.0 if unknown."""
        on_cpu = Counter(member.host for member in self.members if member.device == "cpu")
        computing = sum(min(count, self.site.places.get(host, count)) for host, count in on_cpu.items())
        return self.workload.peak_flops * (computing + len(self.members) - on_cpu.total())

    @property
    def copies(self) -> str:
        """Where the further copies of the members' state are: on "other racks" or "other hosts"; "workers" of one host, or none ("")."""
        pairs = [(run.owner, worker) for layer in self.layout.layers for run in layer.intervals for worker in run.replicas]
        if not pairs:
            return ""
        hosts = {member.worker: member.host for member in self.members}
        racks = {worker: self.site.racks.get(host, "") for worker, host in hosts.items()}
        if all(racks[one] and racks[other] and racks[one] != racks[other] for one, other in pairs):
            return "other racks"
        return "other hosts" if all(hosts[one] != hosts[other] for one, other in pairs) else "workers"

    @property
    def copies_kept(self) -> int:
        """How many copies of the members' state there are in all: as many as wanted, as far as there are hosts."""
        return self.fleet.replicas + 1

    def place(self, worker: int) -> int:
        """Returns the worker's index among the members, from 0. Raises SettingsError if it is not a member."""
        for place, member in enumerate(self.members):
            if member.worker == worker:
                return place
        raise SettingsError(f"worker {worker} is not a member of epoch {self.epoch}, whose members are {self.workers}")

    def to_json(self) -> dict[str, Any]:
        """Returns JSON types only; `from_json` returns an equal view."""
        return {
            "epoch": self.epoch,
            "attempt": self.attempt,
            "members": [member.to_json() for member in self.members],
            "plan": self.plan.to_json(),
            "layout": self.layout.to_json(),
            "workload": self.workload.to_json(),
            "site": self.site.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> View:
        """The inverse of `to_json`."""
        return cls(
            epoch=data["epoch"],
            attempt=data["attempt"],
            members=tuple(Member.from_json(member) for member in data["members"]),
            plan=Plan.from_json(data["plan"]),
            layout=Layout.from_json(data["layout"]),
            workload=Workload.from_json(data["workload"]),
            site=Site.from_json(data["site"]),
        )
