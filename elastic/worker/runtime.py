"""The steps of one worker over all views: an engine that is exchanged for another one when the members change, without a step being lost.

Every wait for others may end with the news that one of them is gone. Then this worker says so, becomes a member of the next view together
with the others, and goes on from the step that the view resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from elastic.comm.rate_meter import LinkRates, news
from elastic.engine import randomness
from elastic.engine.data import Batch
from elastic.engine.decision import Apply, Wishes
from elastic.engine.effort import SpeedReference
from elastic.errors import CheckpointDamaged, Interrupted, LinkError, MemoryDamaged, MismatchError, TrainerError
from elastic.recovery.proposal import Proposal
from elastic.snapshot.held import StoredCopy
from elastic.snapshot.rest import intact
from elastic.view import View
from elastic.worker.engine import Engine
from elastic.worker.fallback import Restored
from elastic.worker.history import History
from elastic.worker.job import Job
from elastic.worker.loopsettings import Settings, compared
from elastic.worker.onesided import WaitReporter, advice
from elastic.worker.recovery_client import CommittedView, HeldState, RecoveryClient
from elastic.worker.registered import ObjectStates

T = TypeVar("T")

LOST = (LinkError, Interrupted, MemoryDamaged)
"""What a worker recovers from together with the others."""

_DAMAGES, _WITHIN = 3, 10  # so many times within so many steps, memory is not damaged by chance


class WorkerRuntime:
    """`engine` is that of the current view. `unseen` is the decision on the newest step, where that was applied and not handed out yet.

    Every step is of `batch`, and `then` is what belongs to it besides parameters.

    What members do together besides steps, such as an evaluation, is named by its place: the step that it comes behind, whether that is
    in the loop body, behind the loop or in between, and how many there were before it at that place. So whoever does not take part in
    one, since it learnt the result otherwise or joined later, still knows which one comes next.
    """

    def __init__(self, job: Job, member: RecoveryClient, history: History, batch: Batch, then: Callable[[Apply], None]) -> None:
        self._job, self._member, self._history, self._batch, self._then = job, member, history, batch, then
        self._engine: Engine | None = None
        self._retained: Sequence[StoredCopy] = ()
        self._retained_until = 0
        self._place, self._finished = "-1/begin", 0
        self._calls = 0  # what was done together behind the newest step
        self._results: dict[str, Any] = {}
        self._yielded = self._yielded_by_others = -1
        self._amid = False  # the loop body of the newest step is under way
        self._rewound = False  # steps that were handed out are being taken again, from a checkpoint on
        self._flushed = -1
        self._save_asked = -1  # the newest step that was to be saved while training goes on
        self._reference = SpeedReference()
        self._waiting = WaitReporter(job)
        self._links_told: dict[int, LinkRates] = {}
        self._damaged_at: list[int] = []  # steps that this worker could not be ready for
        self.unseen: Apply | None = None
        self.pausing = False
        self.leaves = False  # `train_fn` has returned, in the middle of a loop

    @property
    def engine(self) -> Engine:
        assert self._engine is not None  # every use comes after `found` or `join`
        return self._engine

    @property
    def step(self) -> int:
        """The next step to take."""
        return self._history.step + 1

    @property
    def decision(self) -> Apply | None:
        """On the newest step; None where that was taken by another job, or before all who live."""
        return self._history.answer(self._history.step)

    def found(self, engine: Engine, install: Callable[[], None]) -> None:
        """Begins with the first view's engine; `install` makes its links."""
        self._engine = engine
        try:
            install()
        except LOST as error:
            self._recover(error)

    def found_without_state(self, view: View, error: CheckpointDamaged) -> None:
        """Begins the first view with nothing: the checkpoint that the founders begin with cannot be read here.

        The others give their copies of what this worker lacks, or all begin with an older checkpoint.
        """
        self._member.report_loss(error, view.epoch, self.step, type(error).__name__)
        self._enter_next_view(view)

    def begin(self, objects: ObjectStates | None, name: str) -> None:
        """Goes on behind a step that another job took and handed out; the checkpoint `name` has the `objects` behind it."""
        self._yielded = self._history.step
        self._history.registered.learn(self._yielded, objects, f"checkpoint {name} has")

    def join(self) -> None:
        """Becomes a member of a job that is running, behind the newest step whose loop body is over on all others."""
        self._enter_next_view()

    def rest(self) -> bool:
        """Returns when the newest step is complete everywhere, so that all may pause behind it; False if there is no pause any more.

        A loss ends it: those who are not behind the loop body yet have then not heard of it, nor has whoever joined.
        """
        while self.pausing and self._flushed != self._history.step:
            self._flush_once()
        return self.pausing

    def pause(self) -> None:
        """Stops behind the newest step, which is complete everywhere, and goes on in the view that the members change to."""
        self._job.send({"type": "paused", "epoch": self.engine.view.epoch, "step": self._history.step})
        self._enter_next_view()

    def catch_up(self) -> None:
        """Takes the steps again that were handed out here and given up since, with the settings that they had."""
        if self._history.step >= self._yielded:
            return
        with randomness.kept():  # a loop body may be under way
            while self._history.step < self._yielded or not self.settled():
                if self._history.step < self._yielded and (answer := self.compute()) is not None:
                    self.apply(answer)

    def settled(self) -> bool:
        """Waits for the parameters of the newest step, as other owners have updated them. False if members were lost meanwhile."""
        try:
            self.engine.settle()
        except LOST as error:
            self._recover(error)
            return False
        return True

    def compute(self, saved: Any = None, *, save: bool = False, final: bool = False) -> Apply | None:
        """Computes the next step and takes part in its READY round; None if that failed, and the view is another now.

        `saved` is JSON for the coordinator; `save` asks that the step before is saved before this one is applied. Behind the `final` step
        members do not change: whoever joined would not take part in what the others still do together.
        """
        job, step = self._job, self.step
        known = step <= max(self._yielded, self._yielded_by_others)  # somebody is behind it already: no place to stop at
        before = self._history.answer(step)  # what was decided of it holds
        try:
            epoch = self.engine.view.epoch
            job.progress(epoch, step, self._history.median_s, self._history.committed_at, self._tell)
            stop = before.stop if before is not None else job.stop_requested and not known
            pause = job.pause_requested and not known and not final
            no_save = known or self._save_asked >= step - 1
            settings = self._history.ready(known=known)
            wishes = Wishes(stop=stop, pause=pause, save=save, no_save=no_save, saved=saved, settings=settings)
            with self._waiting.at(epoch, step, computes=True):
                answer = self.engine.compute(step, self._batch, wishes)
            if answer.differ:  # all members hear that
                told = self.engine.gather({"worker": job.worker, "settings": self._history.told})
        except LOST as error:
            self._recover(error)
            return None
        if answer.differ:
            difference = compared({each["worker"]: each["settings"] for each in told})
            raise MismatchError(
                f"step {step} cannot be taken: {difference}. What a loop body sets must be the same on every worker: decide by what all "
                "of them see, such as report.loss or trainer.evaluate, and not by report.leader or something of one worker's own"
                + advice(epoch)
            )
        self._history.committed(job, epoch)
        self._rewound = self._rewound and known
        if self.step >= self._retained_until:
            self._retained = ()  # a step of this view is committed: what was held of the view before is not needed any more
        return answer

    def _tell(self) -> dict[str, Any]:
        """What the agent hears of this worker's speed and links."""
        links = news(self.engine.links(), self._links_told)
        self._links_told |= links
        effort = self.engine.executor.effort.told(self._reference)
        return {"effort": effort, "links": [[peer, *seen] for peer, seen in links.items()]}

    def apply(self, answer: Apply) -> None:
        """Applies a step here, and what else belongs to it; sends what changed. It is decided for ever: taken again, it is the same."""
        again = answer.step <= self._yielded
        self._history.save()
        self.engine.update(answer)
        self._then(answer)
        self._history.applied(answer, again=again)
        self.unseen = None if again else answer
        self.pausing = answer.pause
        try:
            self.engine.publish()
        except LOST as error:
            self._recover(error)

    def handing_out(self) -> Apply:
        """The decision on the unseen step, which is handed out now: until `handed_out` its loop body is under way."""
        answer, self.unseen = self.unseen, None
        assert answer is not None
        self._yielded, self._amid = answer.step, True
        self.at("body", answer.step)
        self._history.entering()
        return answer

    def handed_out(self) -> None:
        """The loop body is over, if one was under way. One that the loop was left in is not over before the next loop."""
        if self._amid:
            self._amid = False
            self._history.left()
            self._history.registered.note(self._yielded)

    def at(self, place: str, step: int) -> None:
        """What is done together from here on is behind `step`: in its loop `body`, at its `save`, at the `close` or `end` of a loop."""
        self._place, self._finished = f"{step}/{place}", 0
        if place in ("body", "end"):
            self._calls = 0
        for name in [name for name in self._results if _forgettable(name, step)]:
            del self._results[name]

    def saving(self) -> None:
        """A save of the newest step is begun. Once it was, it is not begun anew behind a loss."""
        self._save_asked = self._history.step
        self.at("save", self._history.step)

    def flush(self) -> bool:
        """Returns when the newest step is complete everywhere; False if it was taken back, and has to be taken again."""
        step = self._history.step
        while self._history.step == step and self._flushed != step:
            self._flush_once()
        return self._history.step == step

    def _flush_once(self) -> None:
        step = self._history.step
        if self._place != f"{step}/close":
            self.at("close", step)
        if self._once(lambda: self.engine.flush(step)):
            self._flushed = step

    @property
    def begins(self) -> bool:
        """Whether no loop has begun here."""
        return self._place == "-1/begin"

    @property
    def handed(self) -> int:
        """The newest step that was handed out here, or is not to be."""
        return self._yielded

    @property
    def amid(self) -> bool:
        """Whether the loop body of the newest step is under way, or the loop was left in it."""
        return self._amid

    def complete(self) -> None:
        """Returns when the newest step is complete everywhere: in its loop body, or behind a loop that was left in it."""
        self._history.left()
        self.catch_up()
        while not self.flush():
            self.catch_up()
        if self._amid:
            self._history.entering()

    def together(self, collective: Callable[[], T], *, ends_together: bool = True) -> T:
        """The result of a collective, a JSON value that is the same on all members; taken again with those who are left if some are lost.

        Where some had finished it and others not, those take the result over. `ends_together`: nobody is through before all have begun it
        and what others still wait for is small.
        """
        self._history.left()
        self.catch_up()
        while not self._once(collective, ends_together=ends_together):
            self.catch_up()
        if self._amid:
            self._history.entering()
        return self._results[f"{self._place}/{self._finished - 1}"]

    def _once(self, collective: Callable[[], Any], *, ends_together: bool = True) -> bool:
        name = f"{self._place}/{self._finished}"
        if name not in self._results:
            try:
                with self._waits_for_all(loose=not ends_together):
                    self._results[name] = collective()
            except LOST as error:
                self._recover(error)
                return False
        self._finished += 1
        self._calls += 1
        return True

    def _waits_for_all(self, *, loose: bool) -> AbstractContextManager[None]:
        behind, place, _ = f"{self._place}/".split("/")
        if place == "save":  # some may be in it while others wait for the news that the next step can be applied
            return nullcontext()
        call = f"{'end' if place == 'end' else 'body'} {self._calls}"
        epoch, closes = self.engine.view.epoch, place == "close"
        return self._waiting.at(epoch, int(behind), computes=False, leaves=self.leaves, call=call, loose=loose, closes=closes)

    def _recover(self, error: Exception) -> CommittedView:
        """Goes on in the next view after a loss."""
        if not self._job.recovers:
            raise error
        if isinstance(error, MemoryDamaged):
            self._damaged_at = [step for step in self._damaged_at if step > self.step - _WITHIN] + [self.step]
            if len(self._damaged_at) >= _DAMAGES:
                raise TrainerError(f"memory at rest has changed {_DAMAGES} times within {_WITHIN} steps; the last: {error}") from error
            self.engine.rest.told.update(self.engine.rest.damaged)
        self._member.report_loss(error, self.engine.view.epoch, self.step, type(error).__name__)
        return self._enter_next_view()

    def _enter_next_view(self, founded: View | None = None) -> CommittedView:
        """`founded` is the first view, of which this worker is a member without an engine."""
        engine = self._engine
        if engine is not None:
            self._history.note()

        def held_state(lost: Collection[int]) -> HeldState:
            held, salvage = list(self._retained), None
            if engine is not None:
                held = [*engine.held(lost), *filter(intact, held)]
                salvage = engine.salvage()
                engine.abandon()
                if engine.rest.damaged.keys() > engine.rest.told:  # found only now, since others are lost
                    engine.rest.told.update(engine.rest.damaged)
                    self._member.report_loss(engine.damage, engine.view.epoch, self.step, "held")
            results = [[name, result] for name, result in self._results.items()]
            return HeldState(
                held=held,
                yielded=self._yielded,
                progress=self._history.progress(),
                results=results,
                salvage=salvage,
                rewound=self._rewound,
                amid=self._amid,
                changes=self._history.changes(),
                objects=self._history.registered.told,
            )

        last, linked = (founded, ()) if engine is None else (engine.view, engine.peers)
        joined = self._member.recover(held_state, last, linked)
        proposal = joined.proposal
        self._engine, self._retained, self._retained_until = joined.engine, joined.retained, proposal.resume + 2
        if engine is None:
            self._yielded = proposal.seen
            self._history.learn(proposal.changes)
        if joined.restored is None:
            self._history.resume(proposal, self._yielded)
        else:
            restored = joined.restored
            settings = Settings(groups=restored.groups, scheduler=restored.scheduler, attributes=restored.attributes)
            self._history.begin(proposal.resume, settings)
        if self._history.answer(proposal.resume) is None:  # it was taken by another job: nobody hands it out
            self._yielded = max(self._yielded, proposal.resume)
        if engine is None:
            self._learn(proposal, joined.restored)
        self._yielded_by_others = proposal.yielded
        self._rewound = proposal.resume < proposal.yielded - 1
        self._results.update(dict(proposal.results))
        self.pausing = False
        # A step that was not handed out is taken back, or counts though this worker has not heard of it.
        self.unseen = self._history.answer(proposal.resume) if proposal.resume > self._yielded else None
        return joined

    def _learn(self, proposal: Proposal, restored: Restored | None) -> None:
        """Takes over what loop bodies that did not run here have made of registered objects."""
        registered, seen = self._history.registered, self._yielded
        known = next((states for step, states in proposal.objects if step == seen), None)
        if known is None and restored is not None and proposal.resume == seen:
            registered.learn(seen, restored.objects, "the checkpoint has")
        else:
            registered.learn(seen, known, "the other workers have")


def _forgettable(name: str, step: int) -> bool:
    """Whether nobody can be at this place any more; those outside of the loop are passed by every worker that joins."""
    behind, place, _ = name.split("/")
    return place in ("body", "save", "close") and int(behind) < step - 1
