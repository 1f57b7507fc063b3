"""Runs one worker's steps over all views: its engine is replaced when the members change, and no step is lost.

Any wait for other workers may end with an error that one of them is gone. This worker then reports the loss, becomes a member of the next
view together with the others, and continues from the step that the view resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from elastic.comm.rate_meter import LinkRates, news
from elastic.engine import randomness
from elastic.engine.data import Batch
from elastic.engine.decision import Apply, Wishes
from elastic.engine.layer_times import SpeedReference
from elastic.errors import CheckpointDamaged, Interrupted, LinkError, MemoryDamaged, MismatchError, TrainerError
from elastic.host.measures import resident_bytes
from elastic.recovery.inventory import Inventory
from elastic.snapshot.held_copies import StoredCopy
from elastic.snapshot.rest_digests import intact
from elastic.view import View
from elastic.worker.engine import Engine
from elastic.worker.history import History
from elastic.worker.job import Job
from elastic.worker.likeness import Likeness
from elastic.worker.loopsettings import Settings, compared
from elastic.worker.onesided_waits import WaitReporter, advice
from elastic.worker.recovery_client import CommittedView, HeldState, RecoveryClient
from elastic.worker.registered import ObjectStates

T = TypeVar("T")

LOST = (LinkError, Interrupted, MemoryDamaged)
"""The errors that a worker recovers from together with the others."""

_DAMAGES, _WITHIN = 3, 10  # this many damages within this many steps are not a coincidence


class WorkerRuntime:
    """One worker's steps and collectives. `engine` is the current view's. `unseen` is the decision on an applied step not yet yielded.

    Steps compute `batch`; `then` is called when a step is applied, for its effects besides parameters (the scheduler).

    A collective, such as an evaluation, is named by its place: the step that it follows, whether it is in the loop body, after the loop or
    in between, and the number of earlier ones at that place. So a worker that skips one, because it has the result from others or joined
    later, still has the right name for the next.
    """

    def __init__(self, job: Job, member: RecoveryClient, history: History, batch: Batch, then: Callable[[Apply], None]) -> None:
        self._job, self._member, self._history, self._batch, self._then = job, member, history, batch, then
        self._engine: Engine | None = None
        self._retained: Sequence[StoredCopy] = ()
        self._retained_until = 0
        self._place, self._finished = "-1/begin", 0
        self._calls = 0  # collectives after the newest step
        self._results: dict[str, Any] = {}
        self._yielded = self._yielded_by_others = -1
        self._amid = False  # the loop body of the newest step is running
        self._rewound = False  # yielded steps are being taken again from a checkpoint
        self._flushed = -1
        self._save_asked = -1  # the newest step with a periodic save
        self._reference = SpeedReference()
        self._waiting = WaitReporter(job)
        self._links_told: dict[int, LinkRates] = {}
        self._damaged_at: list[int] = []  # steps at which this worker found damaged memory
        self.likeness: Likeness | None = None  # what members compare; None: nothing
        self.unseen: Apply | None = None
        self.pausing = False
        self.leaves = False  # `train_fn` has returned from within a loop

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
        """The decision on the newest step; None if another job took it, or it was taken before all living workers joined."""
        return self._history.answer(self._history.step)

    def found(self, engine: Engine, install: Callable[[], None]) -> None:
        """Begins with the first view's engine; `install` creates its links."""
        self._engine = engine
        engine.begin()
        self._note_loop()
        try:
            install()
        except LOST as error:
            self._recover(error)

    def found_without_state(self, view: View, error: CheckpointDamaged) -> None:
        """Begins the first view without state: the founders' checkpoint cannot be read here.

        The others send their copies of the missing state, or all begin with an older checkpoint.
        """
        self._member.report_loss(error, view.epoch, self.step, type(error).__name__)
        self._enter_next_view(view)

    def begin(self, objects: ObjectStates | None, name: str) -> None:
        """Begins after a step that another job took and yielded; checkpoint `name` has the `objects` as of that step."""
        self._yielded = self._history.step
        self._history.registered.learn(self._yielded, objects, f"checkpoint {name} has")

    def join(self) -> None:
        """Becomes a member of a running job, after the newest step whose loop body has ended on all other workers."""
        self._enter_next_view()

    def rest(self) -> bool:
        """Waits until the newest step is complete everywhere, so that all may pause after it; returns False if the pause was cancelled.

        A loss cancels it: workers that are still in the loop body, and joiners, are not informed of the pause then.
        """
        while self.pausing and self._flushed != self._history.step:
            self._flush_once()
        return self.pausing

    def pause(self) -> None:
        """Stops after the newest step, which is complete everywhere, and continues in the next view."""
        self._job.send({"type": "paused", "epoch": self.engine.view.epoch, "step": self._history.step})
        self._enter_next_view()

    def catch_up(self) -> None:
        """Takes again the steps that were yielded here and undone since, with the settings that they had."""
        if self._history.step >= self._yielded:
            return
        with randomness.kept():  # a loop body may be running
            self._job.during("runtime", self._catch_up)

    def _catch_up(self) -> None:
        while self._history.step < self._yielded or not self.settled():
            if self._history.step < self._yielded and (answer := self.compute()) is not None:
                self.apply(answer)

    def settled(self) -> bool:
        """Waits for the parameters of the newest step from their owners. Returns False if members were lost."""
        try:
            self.engine.settle()
        except LOST as error:
            self._recover(error)
            return False
        return True

    def compute(self, saved: Any = None, *, save: bool = False, final: bool = False) -> Apply | None:
        """Computes the next step and takes part in its READY round; returns None if that failed and the view has changed.

        `saved` is JSON for the coordinator; `save` asks to save the previous step before this one is applied. Members do not change after
        the `final` step: a joiner would not take part in the remaining collectives.
        """
        job, step = self._job, self.step
        sample = None
        if self.likeness is not None and self.likeness.takes(step, self.engine.view):
            if not self.settled():
                return None
            sample = self.likeness.sampled(step)
        known = step <= max(self._yielded, self._yielded_by_others)  # a worker yielded it already, so the job cannot stop before it
        before = self._history.answer(step)  # an earlier decision on it holds
        try:
            epoch = self.engine.view.epoch
            job.progress(epoch, step, self._history.median_s, self._history.committed_at, self._tell)
            no_save = known or self._save_asked >= step - 1
            settings = self._history.ready(known=known)

            def wishes() -> Wishes:
                stop = before.stop if before is not None else job.stop_requested and not known
                pause = job.pause_requested and not known and not final
                return Wishes(stop=stop, pause=pause, save=save, no_save=no_save, saved=saved, settings=settings, sample=sample)

            with self._waiting.at(epoch, step, computes=True, calls=self._calls):
                answer = self.engine.compute(step, self._batch, wishes)
            if answer.differ:  # equal on all members
                told = self.engine.gather({"worker": job.worker, "settings": self._history.told})
        except LOST as error:
            self._recover(error)
            return None
        if answer.differ:
            difference = compared({each["worker"]: each["settings"] for each in told})
            raise MismatchError(
                f"step {step} cannot be taken: {difference}. A loop body must set the same values on every worker: decide by values that "
                "all have, such as report.loss or the Trainer's evaluate(), and not by report.leader or a value of one worker"
                + advice(epoch)
            )
        if self.likeness is not None:
            self.likeness.committed(answer, job.worker)
        self._history.committed(job, epoch, self.engine.executor.taken_over_s)
        self._rewound = self._rewound and known
        if self._retained and self.step >= self._retained_until:
            self.engine.retain_nothing()
            self._retained = ()  # a step of this view is committed: the previous view's copies are no longer needed
        return answer

    def _tell(self) -> dict[str, Any]:
        """Returns the report of this worker's speed and links for the agent."""
        links = news(self.engine.links(), self._links_told)
        self._links_told |= links
        effort = self.engine.executor.effort.told(self._reference)
        tokens = 0 if self.decision is None else self.decision.tokens
        found = {"effort": effort, "tokens": tokens, "links": [[peer, *seen] for peer, seen in links.items()]}
        return {**found, "memory": resident_bytes()}

    def apply(self, answer: Apply) -> None:
        """Applies a step here and sends the changes. The decision is final: if the step is taken again, its result is the same."""
        again = answer.step <= self._yielded
        self._history.save()
        self.engine.update(answer)
        self._history.keep(self.engine.kept)
        self._then(answer)
        self._history.applied(answer, again=again)
        self.unseen = None if again else answer
        self.pausing = answer.pause
        if self.pausing:  # the figures of the change need the present pace
            self._job.progress(self.engine.view.epoch, answer.step + 1, self._history.median_s, self._history.committed_at, always=True)
        self._note_loop()
        try:
            self.engine.publish()
        except LOST as error:
            self._recover(error)

    def handing_out(self) -> Apply:
        """Returns the decision on the unseen step, which is yielded now: its loop body runs until `handed_out`."""
        answer, self.unseen = self.unseen, None
        assert answer is not None
        self._yielded, self._amid = answer.step, True
        self.at("body", answer.step)
        self._history.entering()
        self._note_loop()
        return answer

    def handed_out(self) -> None:
        """Notes the end of the loop body, if one is running. A body in which the loop was left ends when the next loop begins."""
        if self._amid:
            self._amid = False
            self._history.note()
            self._history.registered.note(self._yielded)
            self._note_loop()

    def at(self, place: str, step: int) -> None:
        """Sets the place of the next collectives: after `step`, in its loop `body`, or at the `close` or `end` of a loop."""
        self._place, self._finished = f"{step}/{place}", 0
        if place in ("body", "end"):
            self._calls = 0
        for name in [name for name in self._results if _forgettable(name, step)]:
            del self._results[name]

    def saving(self) -> None:
        """Notes that a save of the newest step begins. It is not begun again after a loss."""
        self._save_asked = self._history.step

    def flush(self) -> bool:
        """Waits until the newest step is complete everywhere; returns False if it was undone and has to be taken again."""
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
        """The newest step that was yielded here, or must not be."""
        return self._yielded

    @property
    def amid(self) -> bool:
        """Whether the loop body of the newest step is running, or the loop was left in it."""
        return self._amid

    def ended(self) -> None:
        """Notes the end of a loop: code behind it must not change what is trained before the next one."""
        self._history.entering()

    def _leaving(self) -> bool:
        """Notes changes before a collective; returns whether they are watched behind it."""
        if self._amid:
            self._history.left()
            return True
        return self._history.left_between()

    def complete(self) -> None:
        """Waits until the newest step is complete everywhere; called in its loop body, or after a loop that was left in it."""
        watched = self._leaving()
        self.catch_up()
        while not self.flush():
            self.catch_up()
        if watched:
            self._history.entering()

    def together(self, collective: Callable[[], T], *, ends_together: bool = True) -> T:
        """Returns the result of a collective, a JSON value equal on all members; if members are lost, the others run it again.

        If some members had finished it, the others take over their result. `ends_together`: no member finishes before all have begun it,
        and the data that others still wait for is small.
        """
        watched = self._leaving()
        self.catch_up()
        while not self._once(collective, ends_together=ends_together):
            self.catch_up()
        if watched:
            self._history.entering()
        return self._results[f"{self._place}/{self._finished - 1}"]

    def attempt(self, collective: Callable[[], T]) -> T | None:
        """Returns the result of a collective between READY and the update of a step; None if members were lost, and the view has changed.

        It is not run again then: workers that join, and those that the decision has not reached, compute the step and never come to it.
        """
        try:
            return collective()
        except LOST as error:
            self._recover(error)
            return None

    def _once(self, collective: Callable[[], Any], *, ends_together: bool = True) -> bool:
        name = f"{self._place}/{self._finished}"
        if name not in self._results:
            try:
                with self._waits_for_all(loose=not ends_together):
                    self._results[name] = collective()
                self._note_loop()
            except LOST as error:
                self._recover(error)
                return False
        self._finished += 1
        self._calls += 1
        return True

    def _waits_for_all(self, *, loose: bool) -> AbstractContextManager[None]:
        after, place, _ = f"{self._place}/".split("/")
        call = f"{'end' if place == 'end' else 'body'} {self._calls}"
        told = {"leaves": self.leaves, "call": call, "loose": loose, "closes": place == "close", "calls": self._calls}
        return self._waiting.at(self.engine.view.epoch, int(after), computes=False, **told)

    def _note_loop(self) -> None:
        """Stores in this worker's segment what new workers need to go on with the loop if all workers die."""
        self.engine.note_loop(
            lambda: Inventory(
                worker=self._job.worker,
                yielded=self._yielded,
                copies=(),
                progress=self._history.progress(),
                results=[[name, result] for name, result in self._results.items()],
                rewound=self._rewound,
                amid=self._amid,
                changes=self._history.changes(),
                objects=self._history.registered.told,
            )
        )

    def _recover(self, error: Exception) -> CommittedView:
        """Reports a loss and enters the next view."""
        if not self._job.recovers:
            raise error
        if isinstance(error, MemoryDamaged):
            self._damaged_at = [step for step in self._damaged_at if step > self.step - _WITHIN] + [self.step]
            if len(self._damaged_at) >= _DAMAGES:
                often = f"memory was found to be wrong {_DAMAGES} times within {_WITHIN} steps; the last: {error}"
                raise TrainerError(f"{often}. Or an update is not deterministic (the optimizer, a function of after_step)") from error
            self.engine.rest.told.update(self.engine.rest.damaged)
        self._member.report_loss(error, self.engine.view.epoch, self.step, type(error).__name__)
        return self._enter_next_view()

    def _enter_next_view(self, founded: View | None = None) -> CommittedView:
        """Recovers into the next view. `founded` is the first view, if this worker is a member of it without an engine."""
        engine = self._engine
        if engine is not None:
            self._history.note()

        def held_state(lost: Collection[int]) -> HeldState:
            held, salvages = list(self._retained), ()
            if engine is not None:
                held = [*engine.held(lost), *(copy for copy in held if intact(copy) and engine.trusts(copy.step))]
                salvages = engine.salvages()
                engine.abandon()
                if engine.rest.damaged.keys() > engine.rest.told:  # found only by this recovery's check
                    error = engine.comparing.damage()
                    engine.rest.told.update(engine.rest.damaged)
                    self._member.report_loss(error, engine.view.epoch, self.step, "held")
            results = [[name, result] for name, result in self._results.items()]
            return HeldState(
                held=held,
                yielded=self._yielded,
                progress=self._history.progress(),
                results=results,
                salvages=salvages,
                rewound=self._rewound,
                amid=self._amid,
                changes=self._history.changes(),
                objects=self._history.registered.told,
                back=None if engine is None else engine.back,
            )

        last, linked = (founded, ()) if engine is None else (engine.view, engine.peers)
        joined = self._member.recover(held_state, last, linked)
        proposal = joined.proposal
        self._engine, self._retained, self._retained_until = joined.engine, joined.retained, proposal.resume + 2
        joined.engine.begin(joined.retained, engine)
        if engine is None:
            self._yielded = proposal.seen
            self._history.learn(proposal.changes)
        if joined.restored is None:
            self._history.resume(proposal, self._yielded)
        else:
            restored = joined.restored
            settings = Settings(groups=restored.groups, scheduler=restored.scheduler, attributes=restored.attributes)
            self._history.begin(proposal.resume, settings)
        if self._history.answer(proposal.resume) is None:  # another job took it: it is not yielded
            self._yielded = max(self._yielded, proposal.resume)
        if engine is None:
            self._history.registered.take_over(proposal, joined.restored, self._yielded)
        self._yielded_by_others = proposal.yielded
        self._rewound = proposal.resume < proposal.yielded - 1
        self._results.update(dict(proposal.results))
        self.pausing = False
        # A step that was not yielded here is either undone, or committed although this worker has not received its decision.
        self.unseen = self._history.answer(proposal.resume) if proposal.resume > self._yielded else None
        self._note_loop()
        return joined


def _forgettable(name: str, step: int) -> bool:
    """Returns whether no worker can reach this place any more; every worker that joins passes the places outside loops."""
    after, place, _ = name.split("/")
    return place in ("body", "close") and int(after) < step - 1
