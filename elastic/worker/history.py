"""What a worker remembers of the last steps besides tensors: decisions, and the settings that steps were taken with.

Settings are the parameter groups, the scheduler's state, and attributes of layers that the loop body has set. A step that is taken again
has the settings that it had, though the loop body behind it may have changed them since; those are put back afterwards. So what each body
changed is remembered, as a `Change`.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from elastic.engine.decision import Apply
from elastic.engine.same import same
from elastic.engine.zero import ShardedOptimizer
from elastic.errors import TrainerError
from elastic.recovery.inventory import Progress
from elastic.recovery.proposal import Proposal
from elastic.worker.attributes import ABSENT, Attributes
from elastic.worker.inplace import InPlace
from elastic.worker.job import Job
from elastic.worker.loopsettings import Change, Settings, difference, plain_or_none, read, write
from elastic.worker.plain import capture, from_plain, revive, to_plain
from elastic.worker.registered import Registered, digest_of

_RECENT_STEPS = 5
_CHANGES_KEPT = 1000


class History:
    """`step` is the newest step that was applied here (-1: none)."""

    def __init__(self, optimizer: ShardedOptimizer, scheduler: Any, attributes: Attributes, inplace: InPlace | None = None) -> None:
        self.step = -1
        self.committed_at: float | None = None
        self.attributes, self._inplace = attributes, inplace
        self._ready: Settings | None = None  # that the next step is to be taken with
        self.after: list[str] = []  # what is done behind each step
        self.registered = Registered()
        self._optimizer, self._scheduler = optimizer, scheduler
        self._before: Settings | None = None  # that `step` was taken with
        self._after: Settings | None = None  # behind `step`, before its body
        self._changes: dict[int, Change] = {}
        self._forgotten = -1
        self._answers: dict[int, Apply] = {}
        self._took: dict[int, float] = {}
        self._ready_at = time.monotonic()
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._epoch_seen = 0

    @property
    def median_s(self) -> float | None:
        """Seconds of the recent steps, from one APPLY to the next."""
        return statistics.median(self._seconds) if self._seconds else None

    def committed(self, job: Job, epoch: int) -> None:
        """Everybody is ready to apply the next step, so the one before counts. The agent hears of the first one in an epoch."""
        now = time.monotonic()
        self._took[self.step + 1] = now - self._ready_at
        self._ready_at = now
        if epoch == self._epoch_seen and self.committed_at is not None:
            self._seconds.append(now - self.committed_at)
        elif epoch > 1:
            job.send({"type": "committed", "epoch": epoch, "step": self.step, "at": now})
        self.committed_at, self._epoch_seen = now, epoch

    def save(self) -> None:
        """Before the next step is applied: whatever the body of the step before was to change is changed."""
        self._before = self._note() if self._ready is None else self._ready
        self._ready = None

    def ready(self, *, known: bool = False) -> str:
        """A digest of what the next step is taken with, equal on all workers where that is.

        Registered objects are in it unless that step is `known` to somebody: then not all have seen the same loop bodies.
        """
        self._ready = self._note()
        return f"{self._ready.digest(self.attributes)} {self.after} {'' if known else self.registered.digest}"

    def digest(self) -> str:
        """Of settings and registered objects as they are."""
        return f"{self.settings().digest(self.attributes)} {digest_of(self.registered.read())}"

    @property
    def told(self) -> list[Any]:
        """All of it, to be compared value by value."""
        after = ["what after_step was given", ", ".join(self.after) or "nothing"]
        return [after, *self.settings().named(self.attributes), *self.registered.named]

    @property
    def decided(self) -> bool:
        """Whether a step was taken here."""
        return bool(self._took)

    def _note(self) -> Settings:
        """The settings as they are. Notes what the body of the newest step has changed by now."""
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
        """Behind it. If the step was taken `again`, what its body has changed already is put back."""
        self.step = answer.step
        self._answers[answer.step] = answer
        for memory in (self._answers, self._took):
            for step in [known for known in memory if known < answer.step - 1]:
                del memory[step]
        self._after = self._settings()
        if again and (change := self._changes.get(self.step)) is not None:
            self._restore(change.made_to(self._after))

    def entering(self) -> None:
        """The loop body of the newest step begins, or goes on."""
        self.attributes.watch()
        if self._inplace is not None:
            self._inplace.watch()

    def left(self) -> None:
        """It is over, or asks for something that others take part in. Raises TrainerError if it has done what it must not."""
        if self._inplace is not None:
            self._inplace.check(self.step)
        for key, value in self.attributes.changed().items():
            for settings in (self._before, self._after):
                if settings is not None:
                    settings.attributes[key] = value

    def answer(self, step: int) -> Apply | None:
        """The decision on one of the last two steps, where it is known."""
        return self._answers.get(step)

    def seconds_of(self, step: int) -> float:
        """How long one of the last two steps took, from the READY round before it to its own; infinite where it was taken elsewhere."""
        return self._took.get(step, math.inf)

    def progress(self) -> dict[int, Progress]:
        """What others need in order to go on from either of the last two steps: of the newest one from before its body, where known."""
        found = {}
        newest = self._settings() if self._after is None else self._after
        for step, settings in ((self.step - 1, self._before), (self.step, newest)):
            if step >= 0 and settings is not None:
                answer = self._answers.get(step)
                found[step] = Progress(
                    step=step,
                    apply=None if answer is None else asdict(answer),
                    scheduler=plain_or_none(settings.scheduler),
                    groups=[to_plain(group) for group in settings.groups],
                    attributes={name: to_plain(value) for name, value in settings.attributes.items() if value is not ABSENT},
                    body=settings is not self._after,
                )
        return found

    def changes(self) -> list[Any]:
        """What loop bodies have changed, as JSON: `[newest forgotten step, [[step, change], ...]]`."""
        return [self._forgotten, [[step, change.to_plain()] for step, change in self._changes.items()]]

    def learn(self, told: Iterable[Any]) -> None:
        """What others, by `changes`, know of loop bodies that did not run here."""
        for forgotten, changes in told:
            self._forgotten = max(self._forgotten, forgotten)
            for step, change in changes:
                self._changes.setdefault(step, Change.from_plain(change))

    def note(self) -> None:
        """Before the members change: what the body of the newest step has changed so far is remembered."""
        self.left()
        self._note()

    def resume(self, proposal: Proposal, seen: int) -> None:
        """Goes on from the proposal's step, with own memory of it where there is any. The bodies of steps up to `seen` do not run here.

        Raises:
            TrainerError: where the scheduler's state had to come from another worker and cannot travel.
        """
        resume, progress = proposal.resume, proposal.progress
        if resume == self.step:
            return
        after = None
        if resume == self.step - 1 and self._before is not None:
            self._restore(self._before)
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
                self._answers[resume] = Apply(**progress.apply)
        self._stand_at(resume)
        self._after = after

    def _stand_at(self, step: int) -> None:
        if step < self._forgotten:
            raise TrainerError(
                f"the steps behind step {step} must be taken again, and what the loop body changed after step {self._forgotten} is not "
                f"known any more: save checkpoints more often than every {_CHANGES_KEPT} steps, or change settings in fewer of them"
            )
        self.step, self._before, self._after = step, None, None

    def begin(self, step: int, settings: Settings) -> None:
        """Goes on behind `step`, which is in a checkpoint: with its settings, and its scheduler's state if there is a scheduler."""
        if self._scheduler is not None and settings.scheduler is None:
            raise TrainerError(f"the checkpoint has no state of a scheduler, and the Trainer has a {type(self._scheduler).__name__}")
        self._restore(settings)
        self._answers.pop(step, None)
        self._stand_at(step)

    def settings(self) -> Settings:
        """The groups' settings, the scheduler's state and attributes, as they are."""
        return self._settings()

    def _settings(self) -> Settings:
        return read(self._optimizer, self._scheduler, self.attributes)

    def check(self, *, saved: bool) -> None:
        """That settings can travel to others, and the scheduler's state too where it is `saved`. Done before the first step.

        Raises:
            TrainerError: naming what cannot.
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
        except Exception as error:  # whatever a scheduler of the user's may raise
            raise TrainerError(
                f"the state of {name} cannot be in a checkpoint ({type(error).__name__}: {error}): let its state_dict() give numbers, "
                "strings, tensors and containers of them, and load_state_dict() take them"
            ) from error
        if not same(to_plain(now.scheduler), to_plain(capture(self._scheduler.state_dict()))):
            raise TrainerError(f"{name} cannot be in a checkpoint: its load_state_dict() does not bring back what its state_dict() gave")

    def _restore(self, settings: Settings) -> None:
        write(settings, self._optimizer, self._scheduler, self.attributes)
