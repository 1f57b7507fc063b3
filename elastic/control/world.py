"""The driver's interfaces: workers, the loop's timers, etcd, the run directory, the user; and the computation of a proposal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from elastic.control.carrier import Carrier
from elastic.control.events import AttemptId, Propose
from elastic.control.preparing import Timers
from elastic.host.channel import Message
from elastic.host.rundir import RunDirectory
from elastic.membership.etcd_thread import EtcdTask
from elastic.membership.founding import Ready
from elastic.observe.gpu_health import GpuHealth
from elastic.observe.incident import Incident
from elastic.plan.clock_change import Clocking
from elastic.plan.planner import Answers
from elastic.plan.site import LinkSpeed, Pair, Site
from elastic.recovery.expected import memory_needed
from elastic.recovery.gate import check_proposal
from elastic.recovery.inventory import Inventory
from elastic.recovery.proposal import REPLACED_S, Proposal, fall_back, propose
from elastic.view import View


def _ignore(_: Any) -> None:
    """Nobody wants to know."""


def _at_once(compute: Callable[[], Any], done: Callable[[Any], None]) -> None:
    """Computes in the caller's thread."""
    done(compute())


def _nothing() -> None:
    """Nothing is known."""


def _refuses_none(host: str, why: str) -> bool:
    return False


class EtcdThreadLike(Protocol):
    """The part of the etcd thread that a driver uses."""

    def run(self, task: EtcdTask) -> None: ...


class AttemptsLike(Protocol):
    """The part of `membership.attempts.Attempts` that a driver uses."""

    def ask(self) -> None: ...
    def begin(self, attempt_id: AttemptId) -> None: ...
    def publish(self, attempt_id: AttemptId, proposal: Mapping[str, Any]) -> None: ...
    def vote(self, attempt_id: AttemptId, votes: Mapping[int, str | None]) -> None: ...
    def commit(self, attempt_id: AttemptId, view: View, before: View) -> None: ...
    def sweep(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Inputs of a proposal besides the machine's decisions.

    The stages that the job asks for, the measured links, the seconds from a loss until a new worker trains, the prepared plans, what
    segments of dead workers hold, on which hosts these are (`homes`), the resources of the present hosts, and the clocks of GPUs.
    """

    stages: int | None
    links: Mapping[Pair, LinkSpeed] = field(default_factory=dict)
    replaced_s: float = REPLACED_S
    prepared: Answers | None = None
    offers: Sequence[Inventory] = ()
    homes: Mapping[int, str] = field(default_factory=dict)
    hosts: Site = field(default_factory=Site)
    clocking: Clocking | None = None


def worked_out(action: Propose, terms: Terms) -> Proposal:
    """Returns the proposal for an attempt, checked as every worker will check it.

    Raises CoverageLost, CopiesConflict, GateRefused or MismatchError.
    """
    view = replace(action.view, site=action.view.site.having(terms.hosts))
    survivors = {worker: inventory for worker, inventory in action.inventories.items() if worker not in action.joiners}
    common: dict[str, Any] = {
        "last": view,
        "attempt": action.attempt_id[1],
        "joiners": action.joiners,
        "stages": terms.stages,
        "slowdowns": action.slowdowns,
        "links": terms.links,
        "clocking": terms.clocking,
    }
    if action.restore:
        proposal = fall_back(inventories=action.inventories, afresh=action.afresh, back=action.back, **common)
    else:
        common |= {"brief": action.brief, "replaced_s": terms.replaced_s, "prepared": terms.prepared}
        common |= {"offers": terms.offers, "homes": terms.homes}
        proposal = propose(inventories=survivors, leaving=action.leaving, **common)
    check_proposal(proposal, view)
    return proposal


def _as_it_is(failure: Message) -> Message:
    return failure


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All interfaces of a driver.

    `expect` returns the memory that each worker will need when others join. `end` takes the job's outcome, `admit` and `dismiss` maintain
    the list of workers, `say` takes a sentence for the user. `hosts` returns the resources of the present hosts; `several` says that more
    hosts may join. `without_the_rest` returns the outcome if some members have returned, and a failure, its argument, keeps the others from
    returning. `committed` gets each committed view, `incident` each recorded incident. `clocking` returns what is known of the GPUs'
    clocks, if they may be set; `gpu` what the GPU of a lost worker has counted, None if that is not known yet. `compute` makes what takes
    long, in a thread, and gives the loop the result. `refuse` goes on without a host, for a reason; it returns whether it can.
    """

    carrier: Carrier
    timers: Timers
    etcd_thread: EtcdThreadLike
    attempts: AttemptsLike
    directory: RunDirectory
    end: Callable[[Message], None]
    admit: Callable[[Mapping[int, Ready]], None]
    dismiss: Callable[[Sequence[int]], None]
    say: Callable[[str], None]
    hosts: Callable[[], Site] = Site
    without_the_rest: Callable[[Message], Message] = _as_it_is
    committed: Callable[[View], None] = _ignore
    incident: Callable[[Incident], None] = _ignore
    clocking: Callable[[], Clocking | None] = _nothing
    gpu: Callable[[int], GpuHealth | None] = _ignore
    several: bool = False
    deposed: Callable[[str], None] = _ignore
    compute: Callable[[Callable[[], Any], Callable[[Any], None]], None] = _at_once
    refuse: Callable[[str, str], bool] = _refuses_none
    propose: Callable[[Propose, Terms], Proposal] = worked_out
    expect: Callable[..., Mapping[int, int]] = memory_needed
    clock: Callable[[], float] = time.monotonic
