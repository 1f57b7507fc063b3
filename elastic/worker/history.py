"""A worker's history of the last steps besides tensors: decisions, and the settings that steps were taken with.

Settings are the parameter groups, the scheduler's state, and attributes of layers that the loop body has set. A step that is taken again
gets the settings that it had before; the changes of the loop body after it, stored as a `Change`, are made again afterwards.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from elastic.engine.bit_equality import same
from elastic.engine.decision import Apply
from elastic.engine.zero import ShardedOptimizer
from elastic.errors import TrainerError
from elastic.recovery.inventory import Progress
from elastic.recovery.proposal import Proposal
from elastic.worker.inplace_changes import InPlace
from elastic.worker.job import Job
from elastic.worker.layer_attributes import ABSENT, Attributes
from elastic.worker.loopsettings import Change, Settings, difference, plain_or_none, read, write
from elastic.worker.plain_state import capture, from_plain, revive, to_plain
from elastic.worker.registered import Registered, digest_of

_RECENT_STEPS = 5
_CHANGES_KEPT = 1000


class History:
    """The decisions, settings and changes of the last steps; `step` is the newest step applied here (-1: none)."""

    def __init__(self, optimizer: ShardedOptimizer, scheduler: Any, attributes: Attributes, inplace: InPlace | None = None) -> None:
        self.step = -1
        self.committed_at: float | None = None
        self.attributes, self._inplace = attributes, inplace
        self._ready: Settings | None = None  # of the next step
        self.after: list[str] = []  # names of the functions given to after_step
        self.registered = Registered()
        self._optimizer, self._scheduler = optimizer, scheduler
        self._before: Settings | None = None  # that `step` was taken with
        self._older: dict[int, Settings] = {}  # after the bodies of the steps that can be gone back to
        self._kept: int | None = None
        self._after: Settings | None = None  # after `step`, before its body
        self._changes: dict[int, Change] = {}
        self._forgotten = -1
        self._answers: dict[int, Apply] = {}
        self._took: dict[int, float] = {}
        self._ready_at = time.monotonic()
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)  # of the present view
        self._seconds_before: float | None = None  # the median of the view before
        self._epoch_seen = 0

    @property
    def median_s(self) -> float | None:
        """The median seconds of the recent steps, from one APPLY to the next; of the view before, if this one has none yet."""
        return statistics.median(self._seconds) if self._seconds else self._seconds_before

    def committed(self, job: Job, epoch: int, taken_over_s: float) -> None:
        """Notes that all workers are ready to apply the next step, so `step` is committed. Reports an epoch's first one to the agent.

        In that step this worker has computed for `taken_over_s` what other workers were to compute in the view before.
        """
        now = time.monotonic()
        self._took[self.step + 1] = now - self._ready_at
        self._ready_at = now
        if epoch == self._epoch_seen and self.committed_at is not None:
            self._seconds.append(now - self.committed_at)
        else:
            self._seconds_before = self.median_s
            self._seconds.clear()
        if epoch != self._epoch_seen and epoch > 1:
            job.send({"type": "committed", "epoch": epoch, "step": self.step, "at": now, "taken_over_s": taken_over_s})
        self.committed_at, self._epoch_seen = now, epoch

    def save(self) -> None:
        """Stores the settings before the next step is applied, when the body of `step` has made all its changes."""
        self._before = self._note() if self._ready is None else self._ready
        self._ready = None
        self._older[self.step] = self._before

    def keep(self, step: int | None) -> None:
        """Keeps the settings after `step`, whose state all may go back to, besides those of the last two steps."""
        self._kept = step
        self._older = {known: settings for known, settings in self._older.items() if known >= self.step - 1 or known == step}

    def ready(self, *, known: bool = False) -> str:
        """Returns a digest of the next step's settings and registered objects, to be compared between workers.

        Registered objects are left out if a worker took that step before (`known`): then not all have run the same loop bodies.
        """
        self._ready = self._note()
        return f"{self._ready.digest(self.attributes)} {self.after} {'' if known else self.registered.digest}"

    def digest(self) -> str:
        """Returns a digest of the present settings and registered objects."""
        return f"{self.settings().digest(self.attributes)} {digest_of(self.registered.read())}"

    @property
    def told(self) -> list[Any]:
        """The values under the digest of `ready`, to be compared one by one."""
        after = ["the list of functions given to after_step", ", ".join(self.after) or "empty"]
        return [after, *self.settings().named(self.attributes), *self.registered.named]

    @property
    def decided(self) -> bool:
        """Whether a READY round was completed here."""
        return bool(self._took)

    def _note(self) -> Settings:
        """Returns the present settings, and stores what the body of the newest step has changed so far."""
        now = self._settings()
        if self._after is not None:
            change = difference(self._after, now)
            if change is None:
                self._changes.pop(self.step, None)
            else:
                self._changes[self.step] = change
                if len(self._changes) > _CHANGES_KEPT:
                    self._forgotten = max(self._forgotten, min(self._changes))
                    del self._changes[min(self._changes)]
        return now

    def applied(self, answer: Apply, *, again: bool = False) -> None:
        """Notes that a step was applied. If it was taken `again`, makes the changes of its body again."""
        self.step = answer.step
        self._answers[answer.step] = answer
        for memory in (self._answers, self._took):
            for step in [known for known in memory if known < answer.step - 1 and known != self._kept]:
                del memory[step]
        self._after = self._settings()
        if again and (change := self._changes.get(self.step)) is not None:
            self._restore(change.made_to(self._after))

    def entering(self) -> None:
        """Starts to watch for changes: the loop body of the newest step begins or continues."""
        self.attributes.watch()
        if self._inplace is not None:
            self._inplace.watch()

    def goes_on(self) -> None:
        """Notes what code between two loops has changed. Raises TrainerError for a forbidden change."""
        self.left()
        if self._inplace is not None and self.step >= 0:
            self._inplace.check_names(self.step)

    def left_between(self) -> bool:
        """Notes such changes before a collective; returns whether to watch behind it. If one is forbidden, `goes_on` will raise."""
        if self._inplace is None or not self._inplace.unchanged:
            return False
        self.left()
        return True

    @property
    def changed_behind(self) -> tuple[bool, bool]:
        """Whether code has changed what is trained since the last loop (or body) ended; and whether it wrote other values to it."""
        return (False, False) if self._inplace is None else (self._inplace.changed, self._inplace.values_changed)

    def left(self) -> None:
        """Notes the changes of the loop body, which ends or calls a collective. Raises TrainerError for a forbidden change."""
        if self._inplace is not None:
            self._inplace.check(self.step)
        for key, value in self.attributes.changed().items():
            for settings in (self._before, self._after):
                if settings is not None:
                    settings.attributes[key] = value

    def answer(self, step: int) -> Apply | None:
        """Returns the decision on one of the last two steps, None if it is unknown."""
        return self._answers.get(step)

    def seconds_of(self, step: int) -> float:
        """Returns the seconds of one of the last two steps, from the previous READY round to its own; infinite if not taken here."""
        return self._took.get(step, math.inf)

    def progress(self) -> dict[int, Progress]:
        """Returns what others need to resume after either of the last two steps, or the kept one; for the newest, from before its body."""
        found = {}
        newest = self._settings() if self._after is None else self._after
        older = () if self._kept is None else ((self._kept, self._older.get(self._kept)),)
        for step, settings in (*older, (self.step - 1, self._before), (self.step, newest)):
            if step >= 0 and settings is not None:
                answer = self._answers.get(step)
                found[step] = Progress(
                    step=step,
                    apply=None if answer is None else answer.to_json(),
                    scheduler=plain_or_none(settings.scheduler),
                    groups=[to_plain(group) for group in settings.groups],
                    attributes={name: to_plain(value) for name, value in settings.attributes.items() if value is not ABSENT},
                    body=settings is not self._after,
                )
        return found

    def changes(self) -> list[Any]:
        """Returns the changes of loop bodies as JSON: `[newest forgotten step, [[step, change], ...]]`."""
        return [self._forgotten, [[step, change.to_plain()] for step, change in self._changes.items()]]

    def learn(self, told: Iterable[Any]) -> None:
        """Adds other workers' `changes` for loop bodies that did not run here."""
        for forgotten, changes in told:
            self._forgotten = max(self._forgotten, forgotten)
            for step, change in changes:
                self._changes.setdefault(step, Change.from_plain(change))

    def note(self) -> None:
        """Stores what the body of the newest step has changed so far; called before the members change."""
        self.left()
        self._note()

    def resume(self, proposal: Proposal, seen: int) -> None:
        """Goes back to the proposal's step, with own settings of it if there are any. Bodies of steps up to `seen` do not run here.

        Raises:
            TrainerError: if the scheduler's state would have to come from another worker but cannot be sent.
        """
        resume, progress = proposal.resume, proposal.progress
        if resume == self.step:
            return
        after, own = None, self._before if resume == self.step - 1 else self._older.get(resume)
        if own is not None:
            self._restore(own)
        elif progress is not None:
            settings = Settings(
                groups=[from_plain(group) for group in progress.groups],
                scheduler=None if progress.scheduler is None else from_plain(progress.scheduler),
                attributes={name: from_plain(value) for name, value in progress.attributes.items()},
            )
            if self._scheduler is not None and settings.scheduler is None:
                raise TrainerError(
                    f"the state of {type(self._scheduler).__name__} cannot be sent to a worker that joins: it holds more than numbers"
                )
            after = None if progress.body else settings
            change = self._changes.get(resume) if after is not None and resume <= seen else None
            self._restore(settings if change is None else change.made_to(settings))
            if progress.apply is not None:
                self._answers[resume] = Apply.from_json(progress.apply)
        self._stand_at(resume)
        self._after = after

    def _stand_at(self, step: int) -> None:
        if step < self._forgotten:
            raise TrainerError(
                f"the steps after step {step} must be taken again, but the loop body's changes after step {self._forgotten} are no longer "
                f"stored: save checkpoints more often than every {_CHANGES_KEPT} steps, or change settings in fewer of them"
            )
        self.step, self._before, self._after = step, None, None
        self._older, self._kept = {}, None

    def begin(self, step: int, settings: Settings) -> None:
        """Begins after `step` of a checkpoint, with its settings, and its scheduler's state if there is a scheduler."""
        if self._scheduler is not None and settings.scheduler is None:
            raise TrainerError(f"the checkpoint has no scheduler state, but the Trainer has a {type(self._scheduler).__name__}")
        self._restore(settings)
        self._answers.pop(step, None)
        self._stand_at(step)

    def settings(self) -> Settings:
        """Returns the present settings of groups, scheduler and attributes."""
        return self._settings()

    def put_back(self, settings: Settings) -> None:
        """Makes these the settings of the next step, between two loops."""
        self.left()
        self._restore(settings)

    def _settings(self) -> Settings:
        return read(self._optimizer, self._scheduler, self.attributes)

    def check(self, *, saved: bool) -> None:
        """Checks that settings can be sent to other workers, and, if checkpoints are `saved`, the scheduler's state; before the first step.

        Raises:
            TrainerError: naming a setting that cannot be sent or saved.
        """
        now = self._settings()
        for number, group in enumerate(now.groups):
            try:
                to_plain(group)
            except TypeError as error:
                raise TrainerError(
                    f"the settings of parameter group {number} cannot be sent to other workers: {error}. Use numbers, strings, tensors and "
                    "containers of them"
                ) from error
        if not saved or self._scheduler is None:
            return
        name = type(self._scheduler).__name__
        try:
            again = from_plain(json.loads(json.dumps(to_plain(now.scheduler))))
            self._scheduler.load_state_dict(revive(again, self._scheduler.state_dict()))
        except Exception as error:  # a user's scheduler may raise anything
            raise TrainerError(
                f"the state of {name} cannot be in a checkpoint ({type(error).__name__}: {error}): its state_dict() must return numbers, "
                "strings, tensors and containers of them, and load_state_dict() must accept them"
            ) from error
        if not same(to_plain(now.scheduler), to_plain(capture(self._scheduler.state_dict()))):
            raise TrainerError(f"{name} cannot be in a checkpoint: its load_state_dict() does not restore what its state_dict() returned")

    def _restore(self, settings: Settings) -> None:
        write(settings, self._optimizer, self._scheduler, self.attributes)
