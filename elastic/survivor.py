"""The steps of one worker over all views: an engine that is exchanged for another one when the members change, without a step being lost.

Every wait for others may end with the news that one of them is gone. Then this worker says so, becomes a member of the next view together
with the others, and goes on from the step that the view resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from elastic.comm.gauge import Seen, news
from elastic.engine import randomness
from elastic.engine.data import Batch
from elastic.engine.effort import Yardstick
from elastic.engine.engine import Apply, Engine
from elastic.errors import CheckpointDamaged, Interrupted, LinkError, MemoryDamaged, ReplicaRefused, TrainerError
from elastic.history import History
from elastic.job import Job
from elastic.recovery.member import Joined, Member, Stock
from elastic.snapshot.held import Stored
from elastic.snapshot.rest import intact
from elastic.view import View

T = TypeVar("T")

LOST = (LinkError, Interrupted, ReplicaRefused, MemoryDamaged)
"""What a worker recovers from together with the others."""

_RESULTS_KEPT = 8
_DAMAGES, _WITHIN = 3, 10  # so many times within so many steps, memory is not damaged by chance


class Survivor:
    """`engine` is that of the current view. `unseen` are the decisions on applied steps that were not handed out yet, in order.

    It is one, or two where the others applied a step without this worker, which then goes on behind it. Every step is of `batch`, and
    `then` is what belongs to it besides parameters.
    """

    def __init__(self, job: Job, member: Member, history: History, batch: Batch, then: Callable[[Apply], None]) -> None:
        self._job, self._member, self._history, self._batch, self._then = job, member, history, batch, then
        self._engine: Engine | None = None
        self._retained: Sequence[Stored] = ()
        self._retained_until = 0
        self._finished = 0  # collectives, besides steps
        self._results: dict[int, Any] = {}
        self._yielded = self._yielded_by_others = -1
        self._rewound = False  # steps that were handed out are being taken again, from a checkpoint on
        self._yardstick = Yardstick()
        self._links_told: dict[int, Seen] = {}
        self._damaged_at: list[int] = []  # steps that this worker could not be ready for
        self.unseen: list[Apply] = []

    @property
    def engine(self) -> Engine:
        assert self._engine is not None  # every use comes after `found` or `join`
        return self._engine

    @property
    def step(self) -> int:
        """The next step to take."""
        return self._history.step + 1

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

    def begin(self) -> None:
        """Goes on behind a step that another job took and handed out."""
        self._yielded = self._history.step

    def join(self) -> None:
        """Becomes a member of a job that is running."""
        proposal = self._enter_next_view().proposal
        self._yielded, self.unseen = max(proposal.resume, proposal.yielded), []
        self._finished = max(self._results, default=-1) + 1

    def pause(self) -> None:
        """Stops behind the newest step, which is complete everywhere, and goes on in the view that the members change to."""
        self._job.send({"type": "paused", "epoch": self.engine.view.epoch, "step": self._history.step})
        self._enter_next_view()

    def catch_up(self) -> None:
        """Takes the steps again that a checkpoint lacked, up to the newest that was handed out here."""
        if self._history.step >= self._yielded:
            return
        with randomness.kept():  # a loop body may be under way
            while self._history.step < self._yielded:
                answer = self.compute()
                if answer is not None:
                    self.apply(answer)
                    self.unseen = [answer for answer in self.unseen if answer.step > self._yielded]

    def compute(self, saved: Any = None, *, final: bool = False) -> Apply | None:
        """Computes the next step and takes part in its READY round; None if that failed, and the view is another now.

        `saved` is JSON for the coordinator. Behind the `final` step members do not change: whoever joined would not take part in what the
        others still do together.
        """
        job, step = self._job, self.step
        known = step <= max(self._yielded, self._yielded_by_others)  # somebody is behind it already: no place to stop at
        try:
            epoch = self.engine.view.epoch
            job.progress(epoch, step, self._history.median_s, self._history.committed_at, self._tell)
            stop, pause = job.stop_requested and not known, job.pause_requested and not known and not final
            answer = self.engine.compute(step, self._batch, stop=stop, pause=pause, saved=saved)
        except LOST as error:
            self._recover(error)
            return None
        self._history.committed(job, epoch)
        self._rewound = self._rewound and known
        if self.step >= self._retained_until:
            self._retained = ()  # a step of this view is committed: what was held of the view before is not needed any more
        return answer

    def _tell(self) -> dict[str, Any]:
        """What the agent hears of this worker's speed and links."""
        links = news(self.engine.links(), self._links_told)
        self._links_told |= links
        effort = self.engine.executor.effort.told(self._yardstick)
        return {"effort": effort, "links": [[peer, *seen] for peer, seen in links.items()]}

    def apply(self, answer: Apply) -> None:
        """Applies a step here, and what else belongs to it; sends what changed."""
        self._history.save(answer)
        self.engine.update(answer)
        self._then(answer)
        self._history.applied(answer)
        self.unseen.append(answer)
        try:
            self.engine.publish()
        except LOST as error:
            self._recover(error)

    @property
    def overdue(self) -> bool:
        """Whether others have handed out a step that this worker has not: they may wait for it in an evaluation, before the next step."""
        return bool(self.unseen) and self.unseen[0].step <= self._yielded_by_others

    def handing_out(self) -> Apply:
        """The decision on the oldest of the unseen steps, which count and are handed out now."""
        answer = self.unseen.pop(0)
        self._yielded = answer.step
        return answer

    def flush(self) -> bool:
        """Returns when the newest step is complete everywhere; False if it was taken back, and has to be taken again."""
        step = self._history.step
        while self._history.step == step:
            if self._once(lambda: self.engine.flush(step)):
                return True
        return False

    def together(self, collective: Callable[[], T]) -> T:
        """The result of a collective, a JSON value that is the same on all members; taken again with those who are left if some are lost.

        Where some had finished it and others not, those take the result over.
        """
        self.catch_up()
        while not self._once(collective):
            self.catch_up()
        return self._results[self._finished - 1]

    def _once(self, collective: Callable[[], Any]) -> bool:
        number = self._finished
        if number not in self._results:
            try:
                result = collective()
            except LOST as error:
                joined = self._recover(error)
                strangers = set(joined.proposal.view.workers).difference(joined.before)
                if number not in self._results and strangers:
                    raise TrainerError(
                        f"workers {sorted(strangers)} joined while others were in the middle of a collective such as an evaluation"
                    ) from error
                return False
            self._results[number] = result
        self._finished = number + 1
        self._results.pop(number - _RESULTS_KEPT, None)
        return True

    def _recover(self, error: Exception) -> Joined:
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

    def _enter_next_view(self, founded: View | None = None) -> Joined:
        """`founded` is the first view, of which this worker is a member without an engine."""
        engine = self._engine

        def stock(lost: Collection[int]) -> Stock:
            held, salvage = list(self._retained), None
            if engine is not None:
                held = [*engine.held(lost), *filter(intact, held)]
                salvage = engine.salvage()
                engine.abandon()
                if engine.rest.damaged.keys() > engine.rest.told:  # found only now, since others are lost
                    engine.rest.told.update(engine.rest.damaged)
                    self._member.report_loss(engine.damage, engine.view.epoch, self.step, "held")
            results = [[number, result] for number, result in self._results.items()]
            return Stock(
                held=held,
                yielded=self._yielded,
                progress=self._history.progress(),
                results=results,
                salvage=salvage,
                rewound=self._rewound,
            )

        last, linked = (founded, ()) if engine is None else (engine.view, engine.peers)
        joined = self._member.recover(stock, last, linked)
        proposal = joined.proposal
        self._engine, self._retained, self._retained_until = joined.engine, joined.retained, proposal.resume + 2
        if joined.restored is None:
            self._history.resume(proposal)
        else:
            self._history.begin(proposal.resume, joined.restored.groups, joined.restored.scheduler)
        self._yielded_by_others = proposal.yielded
        self._rewound = proposal.resume < proposal.yielded
        self._results.update(dict(proposal.results))
        self.unseen = [answer for answer in self.unseen if answer.step <= proposal.resume]  # others are taken back, and taken again
        known = max([self._yielded, *(answer.step for answer in self.unseen)])
        answer = self._history.answer(proposal.resume)
        if proposal.resume > known and answer is not None:
            self.unseen.append(answer)
        return joined
