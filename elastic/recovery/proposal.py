"""Proposals: the next view, and the state to move and install before it is committed. Computed once from inventories, then published."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from elastic.errors import CoverageLost, MismatchError, NothingSaved, StateUnproven
from elastic.layout.regions import ITEMSIZE, SAME, ModelSpec
from elastic.layout.transfer import PARAM, Holding, Transfer, minimum_by_layer, transfers
from elastic.plan.choice import HORIZON
from elastic.plan.clock_change import Clocking, clocked
from elastic.plan.fleet import Fleet
from elastic.plan.memory import readable
from elastic.plan.plan import Plan
from elastic.plan.planner import Answers, plan
from elastic.plan.site import LinkSpeed, Pair, Site
from elastic.recovery.agreement import changes_for, objects_for, progress_at, results_of, scalars_at, states_of, with_progress
from elastic.recovery.checkpoint_fallback import INITIAL, Checkpoint, newest
from elastic.recovery.from_segments import copied, reachable, relay
from elastic.recovery.inventory import Inventory, Progress, Scalars
from elastic.recovery.resume import Disagreement, Trust, resume_step
from elastic.recovery.salvage import Routes, restart
from elastic.view import Member, View, laid_out

REPLACED_S = 1.0
"""Seconds from a loss until a new worker trains, before any was measured: about the time to build a small model and join."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """The buffers that training changes, as of the resumed step: worker `source` sends them to the workers `to`, which lack them.

    If `source` has died, the members of its host, `copied`, copy them from its segment, and the first of these is the `sender`.
    """

    source: int
    to: tuple[int, ...]
    digest: str
    copied: tuple[int, ...] = ()

    @property
    def sender(self) -> int:
        return self.copied[0] if self.copied else self.source

    @property
    def receivers(self) -> tuple[int, ...]:
        return tuple(worker for worker in self.to if worker not in self.copied)

    def to_json(self) -> list[Any]:
        """One short list."""
        return [self.source, list(self.to), self.digest, list(self.copied)]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Buffers:
        """The inverse of `to_json`."""
        source, to, digest, copied = data
        return cls(source=source, to=tuple(to), digest=digest, copied=tuple(copied))


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The next `view`, which resumes from the state at step `resume` once `transfers` are done and that step's `scalars` are installed.

    `yielded` is the newest step that a survivor has yielded. `seen` is the newest step whose loop body has ended on all survivors: joiners
    start after it, and so take part in every collective that is still to come. `changes` has the changes of loop bodies that joiners need,
    and `objects` has `[step, states]` of registered objects, as of these steps.
    `finished` are the grains of the next step that every stage has finished, `routes` those of that step (empty: the plan's), and `heirs`
    pairs of a dead worker and the member that takes over its gradient sums. With `restore` nothing moves: every member reads its part of
    that checkpoint, which is of step `resume`. `states` maps optimizer states to dtype names or "same"; it is empty before the first step.
    `copied` are the places in `transfers` of those that their destination copies from the source's segment, on the same host; the source
    may be a worker that has died. The others are sent; `relayed` pairs the place of one with the dead worker from whose segment its source,
    a member of that worker's host, takes it. `leaving` workers send what they have, and are no members.
    `back`: copies of later steps differ, so all go back to this step or an older one; steps that the loops were given are taken again.
    `why` is a sentence for people, `planned` one about the plan's predicted cost. `holdings` is what the survivors hold of step `resume`,
    `conflicts` are the copies in inventories that differ; both are not sent.
    """

    view: View
    resume: int
    transfers: tuple[Transfer, ...]
    states: dict[str, str]
    scalars: Scalars
    progress: Progress | None
    results: list[Any]
    why: str
    planned: str = ""
    finished: tuple[int, ...] = ()
    yielded: int = -1
    restore: Checkpoint | None = None
    buffers: Buffers | None = None
    seen: int = -1
    changes: list[Any] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)
    copied: tuple[int, ...] = ()
    routes: Routes = ()
    heirs: tuple[tuple[int, int], ...] = ()
    back: int | None = None
    relayed: tuple[tuple[int, int], ...] = ()
    leaving: tuple[Member, ...] = ()
    holdings: Sequence[Holding] | None = field(default=None, compare=False, repr=False)
    conflicts: tuple[Disagreement, ...] = field(default=(), compare=False, repr=False)

    @property
    def segments(self) -> list[int]:
        """The workers, living and dead, whose segments the members need, each those of its own host."""
        copied = {self.transfers[place].source for place in self.copied}
        buffers = set[int]() if self.buffers is None else {self.buffers.source}
        dead = {*(dead for dead, _ in self.heirs), *(dead for _, dead in self.relayed)}
        return sorted({*copied, *buffers, *dead, *self.view.workers})

    @property
    def bytes_minimum(self) -> int | None:
        """The least number of bytes that any transfers must move; None if the proposal was read from JSON, and so has no holdings.

        Computing it takes longer than computing the transfers: read it once the job runs again.
        """
        if self.restore is not None:
            return 0
        if self.holdings is None:
            return None
        layout = self.view.layout
        least = minimum_by_layer(self.holdings, layout, [PARAM, *self.states])
        return sum(
            elements * itemsize(layout.model, layer, state, self.states.get(state, SAME))
            for (state, layer), elements in least.items()
            if elements
        )

    def to_json(self) -> dict[str, Any]:
        """JSON types only; `from_json` gives back an equal proposal."""
        return {
            "view": self.view.to_json(),
            "resume": self.resume,
            "transfers": [transfer.to_json() for transfer in self.transfers],
            "states": self.states,
            "scalars": self.scalars,
            "progress": None if self.progress is None else self.progress.to_json(),
            "results": self.results,
            "why": self.why,
            "planned": self.planned,
            "finished": list(self.finished),
            "yielded": self.yielded,
            "restore": None if self.restore is None else self.restore.to_json(),
            "buffers": None if self.buffers is None else self.buffers.to_json(),
            "seen": self.seen,
            "changes": self.changes,
            "objects": self.objects,
            "copied": list(self.copied),
            "routes": [list(route) for route in self.routes],
            "heirs": [list(pair) for pair in self.heirs],
            "back": self.back,
            "relayed": [list(pair) for pair in self.relayed],
            "leaving": [member.to_json() for member in self.leaving],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Proposal:
        """The inverse of `to_json`."""
        return cls(
            view=View.from_json(data["view"]),
            resume=data["resume"],
            transfers=tuple(Transfer.from_json(transfer) for transfer in data["transfers"]),
            states=data["states"],
            scalars=data["scalars"],
            progress=None if data["progress"] is None else Progress.from_json(data["progress"]),
            results=data["results"],
            why=data["why"],
            planned=data["planned"],
            finished=tuple(data["finished"]),
            yielded=data["yielded"],
            restore=None if data["restore"] is None else Checkpoint.from_json(data["restore"]),
            buffers=None if data["buffers"] is None else Buffers.from_json(data["buffers"]),
            seen=data["seen"],
            changes=data["changes"],
            objects=data["objects"],
            copied=tuple(data["copied"]),
            routes=tuple(map(tuple, data["routes"])),
            heirs=tuple((dead, heir) for dead, heir in data["heirs"]),
            back=data["back"],
            relayed=tuple((place, dead) for place, dead in data["relayed"]),
            leaving=tuple(map(Member.from_json, data["leaving"])),
        )


def propose(
    *,
    last: View,
    attempt: int,
    inventories: Mapping[int, Inventory],
    joiners: Mapping[int, Member],
    stages: int | None,
    brief: bool = False,
    slowdowns: Mapping[int, float] | None = None,
    links: Mapping[Pair, LinkSpeed] | None = None,
    replaced_s: float = REPLACED_S,
    prepared: Answers | None = None,
    offers: Sequence[Inventory] = (),
    leaving: Collection[int] = (),
    clocking: Clocking | None = None,
    homes: Mapping[int, str] | None = None,
) -> Proposal:
    """Computes the next view's proposal: survivors (the workers with an inventory) in their order of `last`, then joiners, ascending.

    `offers` are inventories of what segments of dead workers hold: the members of their hosts copy from them; `homes` has the hosts of
    those that are of a view before. Workers `leaving` are no members, and send what they hold.

    `stages` is the number that the job asks for (fewer if there are fewer workers); None leaves it to the planner. `brief`: replacements
    are starting, so a change of plan must pay off within `replaced_s` seconds. `slowdowns` are by worker, 1 by default. `links` are
    measurements made since the last view; `clocking` is what is known of the GPUs' clocks, if they may be set. `prepared` has plans that
    were searched for in advance.

    Raises:
        CoverageLost: if no step that may be resumed is complete, or there is no survivor.
        CopiesConflict: if survivors hold different scalars, dtypes or decisions that must be equal.
        StateUnproven: if survivors hold copies of one step with different digests and no older one that was equal, or different buffers.
        MismatchError: if an inventory is of a worker that is not a member of `last`, or a joiner is one.
    """
    _check_known(last, inventories, joiners)
    hosts = {**(homes or {}), **{member.worker: member.host for member in last.members}}
    if not inventories and not offers:
        raise CoverageLost(f"no worker of epoch {last.epoch} is left")
    model = last.layout.model
    staying = {worker: inventory for worker, inventory in inventories.items() if worker not in leaving}
    members = next_members(last, staying, joiners, slowdowns or {})
    offers = reachable(offers, members, hosts)
    # What members had not written yet when they died is known from those of the view before, whose segments are kept that long.
    told_of_loop = [offer for offer in offers if offer.progress]
    known = [offer for offer in told_of_loop if offer.worker in last.workers] or told_of_loop or offers
    left = [inventories[worker] for worker in last.workers if worker in inventories]
    if not left and not known:
        raise CoverageLost(f"no worker of epoch {last.epoch} is left, and no member is on the hosts on which some have left their state")
    told = [*left, *known]
    offers = [with_progress(offer, {step for each in told for step in each.progress}) for offer in offers]
    left = left or known  # if all have died, what they knew of the loop is in their segments
    sources = [*(inventory for inventory in left if inventory.worker in inventories), *offers]
    trust = Trust.of(sources)
    resume = resume_step(model, sources, trust)
    site = last.site.knowing(links or {})
    brief = brief and not joiners
    horizon = steps_until(replaced_s, last) if brief else HORIZON
    fleet, asked = Fleet.of(members, site), {"stages": stages, "brief": brief, "prepared": prepared}
    if clocking is None:
        planned = plan(fleet, last.workload, last.plan, horizon, **asked)
    else:
        planned = clocked(fleet, last.workload, last.plan, clocking, horizon, **asked)
    view = next_view(last, attempt, members, planned.plan, site)
    again = restart(view, resume + 1, staying, offers, hosts)
    states = states_of(sources) if resume >= 0 else {}
    names = [PARAM, *states]
    holdings = holdings_at(sources, resume, list(states))
    senders = tuple(member for member in last.members if member.worker in inventories and member.worker in leaving)
    moves, relayed = relay(transfers(holdings, view.layout, names), view.members, hosts, senders)
    return Proposal(
        view=view,
        resume=resume,
        transfers=moves,
        states=states,
        copied=copied(moves, view, sources, resume, senders),
        leaving=senders,
        relayed=relayed,
        scalars=scalars_at(sources, resume),
        progress=progress_at(told, resume),
        results=results_of(left),
        holdings=holdings,
        why=_why(last, view, resume, bytes_moved(model, moves, states)),
        planned=planned.plan.why,
        finished=again.finished,
        routes=() if again.routes == view.plan.routes else again.routes,
        heirs=again.heirs,
        back=trust.back,
        conflicts=trust.conflicts,
        yielded=max(inventory.yielded for inventory in left),
        buffers=_buffers([each for each in left if each.worker not in leaving], known, view, resume, hosts),
        seen=min(inventory.seen for inventory in left),
        changes=changes_for(left, joiners),
        objects=objects_for(left, joiners),
    )


def fall_back(
    *,
    last: View,
    attempt: int,
    inventories: Mapping[int, Inventory],
    joiners: Mapping[int, Member],
    stages: int | None,
    slowdowns: Mapping[int, float] | None = None,
    links: Mapping[Pair, LinkSpeed] | None = None,
    clocking: Clocking | None = None,
    afresh: bool = False,
    back: int | None = None,
) -> Proposal:
    """Computes a proposal in which all members begin with the newest checkpoint that any of them sees and none found damaged.

    `inventories` include those of joiners; all workers may be joiners. Then, with `afresh`, they begin with the initial state if nothing
    was saved yet. Copies of the state of later steps than `back` differ: such a checkpoint could be wrong. The other arguments are those of
    `propose`.

    Raises:
        NothingSaved: if there is no checkpoint yet.
        StateUnproven: if the newest checkpoint is of a later step than `back`.
        CoverageLost: if all checkpoints are damaged.
        MismatchError: if an inventory is of a worker that is neither a member of `last` nor a joiner, or a joiner is a member of `last`.
    """
    survivors = {worker: inventory for worker, inventory in inventories.items() if worker not in joiners}
    _check_known(last, survivors, joiners)
    unreadable = {name for inventory in inventories.values() for name in inventory.unreadable}
    checkpoint = newest((inventory.checkpoint for inventory in inventories.values()), unreadable)
    if checkpoint is None and unreadable:
        damaged = ", ".join(sorted(unreadable))
        raise CoverageLost(f"no good checkpoint is left ({damaged}: damaged), and part of the state is lost from all workers' memory")
    if checkpoint is None and afresh and not survivors:
        checkpoint = INITIAL
    if checkpoint is None:
        raise NothingSaved("no good checkpoint has been saved yet, and part of the state is lost from all workers' memory")
    if back is not None and checkpoint.step > back:
        raise StateUnproven(
            f"copies of the state differ, and were equal as of step {back} at last. The newest checkpoint, {checkpoint.name}, is of step "
            f"{checkpoint.step}, so it may be wrong. Start again from one of step {back} or before, and test the memory of the hosts",
            back=back,
        )
    members, site = next_members(last, survivors, joiners, slowdowns or {}), last.site.knowing(links or {})
    asked = Fleet.of(members, site), last.workload, None  # every member reads its part, so the previous plan does not matter
    planned = plan(*asked, stages=stages) if clocking is None else clocked(*asked, clocking, stages=stages)
    view = next_view(last, attempt, members, planned.plan, site)
    left = list(inventories.values())
    return Proposal(
        view=view,
        resume=checkpoint.step,
        transfers=(),
        states={},
        scalars={},
        progress=None,
        results=results_of(left),
        why=_why(last, view, checkpoint.step, 0) + f", since all begin with {checkpoint}",
        planned=planned.plan.why,
        yielded=max(inventory.yielded for inventory in left),
        restore=checkpoint,
        seen=min((inventory.seen for inventory in survivors.values()), default=checkpoint.step),
        changes=changes_for(list(survivors.values()), joiners),
        objects=objects_for(list(survivors.values()), joiners),
    )


def _check_known(last: View, survivors: Iterable[int], joiners: Iterable[int]) -> None:
    if strangers := set(survivors).difference(last.workers) | set(joiners).intersection(last.workers):
        raise MismatchError(
            f"workers {sorted(strangers)}: inventories must be of members of epoch {last.epoch}, and joiners must not be its members"
        )


def next_members(
    last: View, survivors: Collection[int], joiners: Mapping[int, Member], slowdowns: Mapping[int, float]
) -> tuple[Member, ...]:
    """Returns the members of the next view: the survivors in their order, then the joiners, ascending."""
    members = (*(member for member in last.members if member.worker in survivors), *(joiners[worker] for worker in sorted(joiners)))
    return tuple(replace(member, slowdown=slowdowns.get(member.worker, 1.0)) for member in members)


def holdings_at(inventories: Iterable[Inventory], step: int, states: Sequence[str]) -> list[Holding]:
    """Lists what the workers hold of one step; `states` are those besides the parameter."""
    return [
        Holding(worker=inventory.worker, state=state, layer=copy.layer, start=copy.start, stop=copy.stop, role=copy.role)
        for inventory in inventories
        for copy in inventory.copies
        if copy.step == step
        for state in ([PARAM, *states] if copy.full else [PARAM])
    ]


def itemsize(model: ModelSpec, layer: int, state: str, dtype: str) -> int:
    """Returns the bytes of one element of a layer's state; `dtype` is a name, or "same"."""
    return ITEMSIZE[model.dtype(layer, state, dtype)]


def bytes_moved(model: ModelSpec, moves: Iterable[Transfer], states: Mapping[str, str]) -> int:
    """Returns the bytes of all transfers together."""
    return sum(move.elements * itemsize(model, move.layer, move.state, states.get(move.state, SAME)) for move in moves)


def steps_until(seconds: float, view: View) -> float:
    """Returns how many steps of the view's plan take `seconds`, at least 1."""
    return max(1.0, seconds / view.plan.step_s) if view.plan.step_s > 0 else HORIZON


def next_view(last: View, attempt: int, members: tuple[Member, ...], chosen: Plan, site: Site) -> View:
    """Returns the view after `last` with these members and this plan."""
    stages = [(stage.layers, stage.members) for stage in chosen.stages]
    layout = laid_out(last.layout.model, stages, members, site, near=last.layout)
    return replace(last, epoch=last.epoch + 1, attempt=attempt, members=members, plan=chosen, layout=layout, site=site)


def _buffers(
    inventories: Sequence[Inventory], offers: Sequence[Inventory], view: View, step: int, hosts: Mapping[int, str]
) -> Buffers | None:
    """Returns who has the buffers: a worker of `inventories`, or else a dead one, whose segment the members of its host copy them from."""
    if not any(inventory.buffers for inventory in inventories):
        return None
    known: dict[int, str] = {}
    for having in (inventories, offers):
        known = known or {inventory.worker: inventory.buffers[step] for inventory in having if step in inventory.buffers}
    if not known:
        raise CoverageLost(f"no surviving worker has the buffers that training changes as of step {step}")
    source = min(known)
    for worker, digest in known.items():
        if digest != known[source]:
            raise StateUnproven(
                f"the buffers that training changes differ after step {step} between workers {source} and {worker}, "
                "and the runtime cannot find out which are right",
                back=step - 1,
            )
    to = tuple(worker for worker in view.workers if worker not in known)
    near = [member.worker for member in view.members if source not in hosts or member.host == hosts[source]]
    copied = () if source in view.workers else tuple(worker for worker in near if worker in to)
    return Buffers(source=source, to=to, digest=known[source], copied=copied)


def _why(last: View, view: View, resume: int, moved: int) -> str:
    gone = [f"worker {worker} (place {last.place(worker)})" for worker in last.workers if worker not in view.workers]
    come = [f"worker {worker}" for worker in view.workers if worker not in last.workers]
    parts = [f"{' and '.join(who)} {did}" for who, did in ((gone, "left"), (come, "joined")) if who]
    start = f"after step {resume}" if resume >= 0 else "from the initial state"
    return f"{', '.join(parts) or 'nobody left or joined'}: going on {start} as {view.plan.summary}, for which {readable(moved)} move"
