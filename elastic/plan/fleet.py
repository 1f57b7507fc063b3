"""The fleet: the workers that a plan is made for, with their speed, memory and host, and the links between hosts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from elastic.errors import PlanError
from elastic.plan.site import LinkSpeed, Site

HOST = "host"

SHARE = 0.9
"""Share of a host's memory that the workers of a job may use."""


class FleetMember(Protocol):
    """What a fleet needs of a member; `elastic.view.Member` has it."""

    @property
    def worker(self) -> int: ...
    @property
    def host(self) -> str: ...
    @property
    def slowdown(self) -> float: ...
    @property
    def memory(self) -> int | None: ...
    @property
    def base(self) -> int: ...
    @property
    def segment(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Workers by id, in the order in which stages are filled.

    A layer takes a worker `slowdowns[worker]` times as long as the workload states, 1 for workers not listed. `memory` is in bytes,
    unlimited for workers not listed; those not in `hosts` share one host. `outlive`: their state outlives their
    processes. Raises PlanError unless there are workers, each once.
    """

    workers: tuple[int, ...]
    slowdowns: Mapping[int, float] = field(default_factory=dict)
    memory: Mapping[int, int] = field(default_factory=dict)
    hosts: Mapping[int, str] = field(default_factory=dict)
    site: Site = field(default_factory=Site)
    outlive: bool = False

    def __post_init__(self) -> None:
        if len(set(self.workers)) < len(self.workers) or not self.workers:
            raise PlanError(f"a plan needs at least one worker and each only once, not {list(self.workers)}")

    @classmethod
    def of(cls, members: Sequence[FleetMember], site: Site) -> Fleet:
        """Makes a fleet of a view's members. Each may use the memory it was given, or an even share of its host's, minus its base."""
        at = Counter(member.host for member in members)
        shares = {
            member.worker: member.memory if member.memory is not None else int(SHARE * site.memory[member.host] / at[member.host])
            for member in members
            if member.memory is not None or member.host in site.memory
        }
        return cls(
            workers=tuple(member.worker for member in members),
            slowdowns={member.worker: member.slowdown for member in members if member.slowdown != 1.0},
            memory={member.worker: max(0, shares[member.worker] - member.base) for member in members if member.worker in shares},
            hosts={member.worker: member.host for member in members},
            site=site,
            outlive=all(member.segment for member in members),
        )

    @property
    def replicas(self) -> int:
        """How many other workers keep a copy of each worker's state: on other hosts, or within one if state does not outlive processes."""
        hosts = len({self.host(worker) for worker in self.workers})
        apart = hosts if hosts > 1 or self.outlive else len(self.workers)
        return min(self.site.copies, apart) - 1

    def slowdown(self, worker: int) -> float:
        return self.slowdowns.get(worker, 1.0)

    def host(self, worker: int) -> str:
        return self.hosts.get(worker, HOST)

    @property
    def equal(self) -> bool:
        """Whether all workers are equally fast."""
        return len({self.slowdown(worker) for worker in self.workers}) == 1

    def link(self, some: Iterable[int], others: Iterable[int]) -> LinkSpeed:
        """Returns the slowest link between a worker of `some` and one of `others`."""
        return self.site.slowest({self.host(worker) for worker in some}, {self.host(worker) for worker in others})

    def ordered(self, workers: Sequence[int]) -> Fleet:
        """Returns the same workers in this order."""
        return replace(self, workers=tuple(workers))

    def least_memory(self, workers: Collection[int]) -> float:
        """Returns the least memory of these workers in bytes; infinite if none is limited."""
        return min((self.memory[worker] for worker in workers if worker in self.memory), default=float("inf"))
