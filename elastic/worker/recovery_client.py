"""The worker's side of recovery: it answers the agent's orders until it is a member of a committed view.

    lost ->                    a link broke
    <- quiesce, inventory ->   the lost workers; this worker's copies, with the promise to apply, acknowledge and replicate nothing more
    <- propose, vote ->        memory for its new place is allocated, filled and checked, while the old copies are kept
    <- view, resumed ->        the proposal is committed: only now does it switch

If any step fails, the next order is `quiesce` of the next attempt, and the worker still has its old copies. It frees them when the first
step of the new view is committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, Protocol, TypeVar

import torch

from elastic.comm.endpoint import Endpoint
from elastic.engine.model import LayeredModel
from elastic.engine.salvage import Resumption, Salvage, joined
from elastic.engine.shard import Scalars
from elastic.engine.view_state import ViewState, initial_state
from elastic.engine.zero import ShardedOptimizer
from elastic.errors import CheckpointDamaged, CheckpointError, GateRefused, Interrupted, LinkError, MemoryDamaged, PeerLost
from elastic.host.packed import Packed
from elastic.memory.segment import MappedSegment
from elastic.observe.activity import CHECKPOINT
from elastic.observe.trace_file import TraceFile
from elastic.recovery.checkpoint_fallback import INITIAL, Checkpoint
from elastic.recovery.gate import check_proposal, check_scalars
from elastic.recovery.inventory import Copy, FinishedGrains, Inventory, Progress
from elastic.recovery.proposal import Proposal
from elastic.recovery.salvage import Routes, usable
from elastic.snapshot.held_copies import Held, StoredCopy, UnreplayedCopy, dtypes
from elastic.view import View
from elastic.worker.engine import Engine
from elastic.worker.fallback import Fallback, Restored
from elastic.worker.inheritance import inherited
from elastic.worker.migration import Migration, links
from elastic.worker.plain_state import from_plain, to_plain

P = ParamSpec("P")
T = TypeVar("T")


class Build(Protocol):
    """Makes an engine; `routes` are those of the first step, if they are not the plan's."""

    def __call__(self, view: View, state: ViewState, routes: Routes = ()) -> Engine: ...


class Line(Protocol):
    """A worker's connection to its agent, as far as a recovery uses it: `elastic.worker.job.Job`."""

    worker: int
    segments: dict[int, MappedSegment]
    trace: TraceFile | None

    def send(self, message: dict[str, Any], /) -> None:
        """Sends a message to the agent."""

    def take_order(self) -> dict[str, Any]:
        """Waits for the agent's next order that no later one has made obsolete."""
        ...

    def switch(self, view: View) -> None:
        """Makes this worker a member of a committed view."""

    def enter(self, phase: str, step: int, micro_batch: int = -1) -> None:
        """Publishes the worker's present phase."""

    def during(self, place: str, call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Returns what `call` returns. Publishes meanwhile whose code this worker is in."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldState:
    """A worker's state when it stops: copies, the progress of their steps, and the usable part of the interrupted step.

    `rewound`: it is taking yielded steps again. `amid`: it is in the loop body of the newest yielded step. `changes`: the changes of loop
    bodies. `objects`: `[step, states]` of registered objects after the newest loop body that has ended here. `back`: copies of later steps
    differ between workers (None: of none).
    """

    held: Sequence[StoredCopy]
    yielded: int
    progress: dict[int, Progress]
    results: list[Any]
    salvages: tuple[Salvage, ...] = ()
    rewound: bool = False
    amid: bool = False
    changes: list[Any] = field(default_factory=list)
    objects: list[Any] | None = None
    back: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedView:
    """A committed view's engine and proposal, with the workers of the previous view (`before`) and its copies that are still held.

    `restored`: the state that was read, if the view began with a checkpoint.
    """

    before: tuple[int, ...]
    engine: Engine
    proposal: Proposal
    retained: Sequence[StoredCopy]
    restored: Restored | None = None


class RecoveryClient:
    """Recovers one worker. `build` makes an engine from a view and this worker's initial state in it.

    `fallback` has the job's checkpoints, None if it has none.
    """

    def __init__(
        self,
        job: Line,
        network: Endpoint,
        model: LayeredModel,
        optimizer: ShardedOptimizer,
        build: Build,
        fallback: Fallback | None = None,
    ) -> None:
        self._job, self._network, self._model, self._optimizer, self._build = job, network, model, optimizer, build
        self._fallback = fallback
        self._worker = job.worker

    def report_loss(self, error: Exception, epoch: int, step: int, phase: str) -> None:
        """Reports to the agent why this worker stopped."""
        peer = error.peer if isinstance(error, LinkError) else None
        if not isinstance(error, Interrupted):
            where = {"epoch": epoch, "step": step, "phase": phase, "at": time.monotonic(), "damaged": isinstance(error, MemoryDamaged)}
            where["gone"] = peer is None or isinstance(error, PeerLost)  # else the peer's link is at fault
            where["findings"] = error.findings if isinstance(error, MemoryDamaged) else []
            self._job.send({"type": "lost", "peer": peer, "reason": str(error), **where})

    @torch.inference_mode(False)  # the loop body may be in an evaluation, but memory allocated now is trained on
    def recover(self, held_state: Callable[[Collection[int]], HeldState], last: View | None, linked: Collection[int]) -> CommittedView:
        """Answers orders until a view with this worker is committed. `linked` are the workers that it had links to in the `last` one.

        `held_state` returns this worker's state, given the lost workers. It is called once, at the first `quiesce`.
        """
        found: HeldState | None = None
        inventory: Inventory | None = None
        attempt_id = (0, 0)
        prepared: CommittedView | None = None
        while True:
            order = self._job.take_order()
            if order["type"] == "view":
                view = View.from_json(order["view"])
                if view == last:
                    continue  # announced again, by a new coordinator
                if prepared is None or view != prepared.proposal.view:
                    raise GateRefused(f"worker {self._worker} was sent epoch {view.epoch}, which it did not vote for", check="epoch")
                self._job.switch(view)
                self._job.send({"type": "resumed", "epoch": view.epoch, "attempt": view.attempt, "at": time.monotonic()})
                self._job.enter("idle", prepared.proposal.resume)
                return prepared
            if order["type"] == "quiesce":
                prepared = None
                self._job.enter("quiesce", -1)
                damaged = order.get("damaged", [])
                without = [*order["lost"], *damaged]  # workers whose own copies are missing or incomplete
                while found is None:
                    with suppress(Interrupted):  # by `quiesce` of a later attempt, which is answered next
                        self._network.resume()
                        found = held_state(without)
                if damaged:  # any worker's sums may include results computed with damaged copies
                    found = replace(found, salvages=())
                inventory = self._inventory(found, without)
                if order["restore"] and self._fallback is not None:
                    newest = self._job.during(CHECKPOINT, self._fallback.newest)
                    inventory = replace(inventory, checkpoint=newest, unreadable=tuple(sorted(self._fallback.unreadable)))
                attempt_id = order["epoch"], order["attempt"]
                told = Packed(inventory.to_json(), compressed=False)
                self._job.send({"type": "inventory", "epoch": attempt_id[0], "attempt": attempt_id[1], "inventory": told})
                self._job.enter("propose", -1)
                continue
            if found is None or inventory is None:
                raise GateRefused(f"worker {self._worker} was sent a proposal before it sent an inventory", check="inventory")
            proposal = Proposal.from_json(order["proposal"])
            if (proposal.view.epoch, proposal.view.attempt) != attempt_id:
                continue  # of an earlier attempt
            if self._worker not in proposal.view.workers:
                self._leave(proposal, found)
                continue
            prepared, vote = self._prepared(proposal, found, inventory, last, frozenset(linked), self._job.segments)
            self._job.send({"type": "vote", "epoch": proposal.view.epoch, "attempt": proposal.view.attempt, **vote})

    def _prepared(
        self,
        proposal: Proposal,
        held_state: HeldState,
        inventory: Inventory,
        last: View | None,
        linked: frozenset[int],
        segments: Mapping[int, MappedSegment],
    ) -> tuple[CommittedView | None, dict[str, Any]]:
        """Returns an engine for the proposed view and the vote for it; None and a vote with the reason if that failed."""
        view, step = proposal.view, proposal.resume
        before = () if last is None else last.workers
        self._job.enter("migrate", step)
        try:
            check_proposal(proposal, last, inventory)
            if proposal.restore is not None:
                return self._restored(proposal, proposal.restore, before, linked)
            scalars: Scalars = {name: from_plain(values) for name, values in proposal.scalars.items()}
            migration = Migration(self._worker, proposal, held_state.held, scalars, self._model, self._optimizer, self._network, segments)
            engine = self._build(view, migration.state, proposal.routes)
            own = next((each for each in held_state.salvages if each.step == step + 1), None)
            if own is not None and not usable(view, proposal.routes or view.plan.routes, inventory, step + 1):
                own = own.without_sums
            salvage = joined(own, [inherited(segments[dead], self._model) for dead, heir in proposal.heirs if heir == self._worker])
            routed = [] if last is None or self._worker not in last.workers else last.plan.routes[last.plan.stage_of(self._worker)]
            mine = frozenset(grain for grain, worker in enumerate(routed) if worker == self._worker)
            engine.resume(Resumption(step=step + 1, grains=frozenset(proposal.finished), salvage=salvage, own=mine))
            self._network.install(view.epoch, view.attempt, (*view.members, *proposal.leaving), engine.peers | migration.peers)
            moved = migration.run()
            for member in proposal.leaving:  # it ends once the view is committed, and that is no loss
                self._network.drop(member.worker)
            if proposal.buffers is not None:
                self._model.running.restore(step)
            self._check_scalars(proposal, migration.state)
            engine.prepared(migration.state, proposal.scalars)
            self._job.enter("gate", step)
        except (LinkError, Interrupted, GateRefused, CheckpointError) as error:
            peer = error.peer if isinstance(error, LinkError) else None
            unreadable = isinstance(error, CheckpointDamaged)
            why = {"refusal": str(error), "failed_peer": peer, "unreadable": unreadable}
            return None, {**why, "received_bytes": 0, "copied_bytes": 0, "links": {}, "times": {}}
        times = {"installed": moved.installed, "moved": moved.moved, "checked": moved.checked}
        if (trace := self._job.trace) is not None:
            sizes = {"received_bytes": moved.received_bytes, "copied_bytes": moved.copied_bytes}
            trace.mark("transfers", moved.installed, moved.moved, epoch=view.epoch, **sizes)
            trace.mark("digests", moved.moved, moved.checked, epoch=view.epoch)
        figures = links(self._worker, linked, self._network.stats.links, view)
        sizes = {"received_bytes": moved.received_bytes, "copied_bytes": moved.copied_bytes}
        vote = {"refusal": None, "failed_peer": None, **sizes, "links": figures, "times": times}
        self._job.enter("commit", step)
        return CommittedView(before=before, engine=engine, proposal=proposal, retained=migration.retained), vote

    def _leave(self, proposal: Proposal, held_state: HeldState) -> None:
        """Sends what the members of the next view need of this worker, which is ended once that view is committed.

        If it fails, the members that wait for it refuse the proposal, and the next attempt's orders follow.
        """
        view = proposal.view
        self._job.enter("migrate", proposal.resume)
        with suppress(LinkError, Interrupted, GateRefused):
            scalars: Scalars = {name: from_plain(values) for name, values in proposal.scalars.items()}
            held, segments = held_state.held, self._job.segments
            migration = Migration(self._worker, proposal, held, scalars, self._model, self._optimizer, self._network, segments)
            self._network.install(view.epoch, view.attempt, (*view.members, *proposal.leaving), migration.peers)
            migration.run()
            self._job.enter("commit", proposal.resume)

    def _restored(
        self, proposal: Proposal, checkpoint: Checkpoint, before: tuple[int, ...], linked: frozenset[int]
    ) -> tuple[CommittedView, dict[str, Any]]:
        """Does what `_prepared` does, for a proposal with a checkpoint; the reader verifies the digests."""
        view, installed = proposal.view, time.monotonic()
        restored = None if checkpoint == INITIAL else self._read(view, checkpoint)
        state = self._initial(view) if restored is None else restored.state
        moved = time.monotonic()
        self._job.enter("gate", proposal.resume)
        engine = self._build(view, state)
        self._network.install(view.epoch, view.attempt, view.members, engine.peers)
        times = {"installed": installed, "moved": moved, "checked": time.monotonic()}
        figures = links(self._worker, linked, self._network.stats.links, view)
        vote = {"refusal": None, "failed_peer": None, "received_bytes": 0, "copied_bytes": 0, "links": figures, "times": times}
        self._job.enter("commit", proposal.resume)
        return CommittedView(before=before, engine=engine, proposal=proposal, retained=(), restored=restored), vote

    def _read(self, view: View, checkpoint: Checkpoint) -> Restored:
        if self._fallback is None:
            raise GateRefused(f"worker {self._worker} has no checkpoint directory", check="restore")
        return self._job.during(CHECKPOINT, self._fallback.restore, view, checkpoint)

    def _initial(self, view: View) -> ViewState:
        """Returns the initial state, as founders begin with it."""
        if not self._model.whole:
            raise GateRefused(f"worker {self._worker} no longer has the initial parameters", check="restore")
        return initial_state(self._worker, self._model, self._optimizer, view)

    def _check_scalars(self, proposal: Proposal, state: ViewState) -> None:
        """Checks that the installed scalars are those of the proposal. Before the first step there is nothing to check."""
        if proposal.resume < 0:
            return
        installed = {
            name: to_plain(dict(values))
            for updater, shards in ((self._optimizer.owned, state.owned), (self._optimizer.kept, state.kept))
            for shard in shards
            for name, values in updater.scalars(shard).items()
        }
        check_scalars(proposal.scalars, installed)

    def _inventory(self, held_state: HeldState, lost: Collection[int]) -> Inventory:
        steps: dict[int, Scalars] = {}
        # Living owners report scalars and dtypes of their replicas; `lost` may have grown since the first attempt.
        told = [copy for copy in held_state.held if not isinstance(copy, UnreplayedCopy) or copy.owner in lost]
        for copy in told:
            for name, values in copy.scalars.items():
                steps.setdefault(copy.step, {})[name] = to_plain(dict(values))
        copies = (
            Copy(
                layer=h.layer,
                start=h.start,
                stop=h.stop,
                step=h.step,
                role=h.role,
                digest=h.digest if isinstance(h, Held) else None,
                scalars=not isinstance(h, UnreplayedCopy) or h.owner in lost,
            )
            for h in held_state.held
        )
        return Inventory(
            worker=self._worker,
            yielded=held_state.yielded,
            copies=tuple(copies),
            states=dtypes(told, self._model.state_dtypes()),
            scalars=steps,
            progress=held_state.progress,
            results=held_state.results,
            finished=tuple(map(finished, held_state.salvages)),
            rewound=held_state.rewound,
            buffers=self._model.running.steps,
            amid=held_state.amid,
            changes=held_state.changes,
            objects=held_state.objects,
            back=held_state.back,
        )


def finished(salvage: Salvage) -> FinishedGrains:
    """Returns a salvage as an inventory lists it."""
    return FinishedGrains(
        step=salvage.step,
        layers=salvage.layers,
        grains=tuple(sorted(salvage.grains)),
        summed=tuple(sorted(salvage.summed)),
        begun=tuple(sorted(salvage.begun)),
    )
