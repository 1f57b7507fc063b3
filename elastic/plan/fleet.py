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
"""Share of a host's memory that the workers of a job may use, and of a device's that a plan may: the rest is for what it does not count."""


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
    @property
    def device(self) -> str: ...
    @property
    def device_memory(self) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Workers by id, in the order in which stages are filled.

    A layer takes a worker `slowdowns[worker]` times as long as the workload states, 1 for workers not listed. `memory` is in bytes,
    unlimited for workers not listed; those not in `hosts` share one host. `outlive`: their state outlives their processes. `on_device`:
    they compute on devices, whose memory is in `device_memory`. Raises PlanError unless there are workers, each once.
    """

    workers: tuple[int, ...]
    slowdowns: Mapping[int, float] = field(default_factory=dict)
    memory: Mapping[int, int] = field(default_factory=dict)
    hosts: Mapping[int, str] = field(default_factory=dict)
    site: Site = field(default_factory=Site)
    outlive: bool = False
    on_device: bool = False
    device_memory: Mapping[int, int] = field(default_factory=dict)

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
            on_device=any(member.device != "cpu" for member in members),
            device_memory={m.worker: int(SHARE * m.device_memory) for m in members if m.device_memory is not None},
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

    @property
    def memory_alike(self) -> bool:
        """Whether all workers have the same limits of memory, so that they can be exchanged."""
        return len({(self.memory.get(worker), self.device_memory.get(worker)) for worker in self.workers}) == 1

    def least_memory(self, workers: Collection[int]) -> float:
        """Returns the least memory of these workers in bytes; infinite if none is limited."""
        return _least(self.memory, workers)

    def least_device_memory(self, workers: Collection[int]) -> float:
        """Returns the least device memory of these workers in bytes; infinite if none is limited."""
        return _least(self.device_memory, workers)


def _least(limits: Mapping[int, int], workers: Collection[int]) -> float:
    return min((limits[worker] for worker in workers if worker in limits), default=float("inf"))
