"""What a worker remembers of the last two steps besides tensors: decisions, and the states of scheduler and parameter groups."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from elastic.engine.engine import Apply
from elastic.engine.same import same
from elastic.engine.zero import ShardedOptimizer
from elastic.errors import TrainerError
from elastic.job import Job
from elastic.recovery.inventory import Progress
from elastic.recovery.plain import capture, from_plain, revive, to_plain
from elastic.recovery.proposal import Proposal

_RECENT_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Groups' settings and scheduler state, as they were when a step had been applied and its loop body had run."""

    groups: list[dict[str, Any]]
    scheduler: dict[str, Any] | None


class History:
    """`step` is the newest step that was applied here (-1: none)."""

    def __init__(self, optimizer: ShardedOptimizer, scheduler: Any) -> None:
        self.step = -1
        self.committed_at: float | None = None
        self._optimizer, self._scheduler = optimizer, scheduler
        self._before: Settings | None = None  # at step - 1
        self._answers: dict[int, Apply] = {}
        self._lr: dict[int, float] = {}
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

    def save(self, answer: Apply) -> None:
        """Before step `answer.step` is applied."""
        self._before = self._settings()
        self._lr[answer.step] = float(self._optimizer.optimizer.param_groups[0]["lr"])

    def applied(self, answer: Apply) -> None:
        """Behind it."""
        self.step = answer.step
        self._answers[answer.step] = answer
        for memory in (self._answers, self._lr, self._took):
            for step in [known for known in memory if known < answer.step - 1]:
                del memory[step]

    def answer(self, step: int) -> Apply | None:
        """The decision on one of the last two steps, where it is known."""
        return self._answers.get(step)

    def seconds_of(self, step: int) -> float:
        """How long one of the last two steps took, from the READY round before it to its own; infinite where it was taken elsewhere."""
        return self._took.get(step, math.inf)

    def lr_of(self, step: int) -> float:
        """The first group's learning rate that a step was taken with, where that is known."""
        return self._lr.get(step, float("nan"))

    def progress(self) -> dict[int, Progress]:
        """What others need in order to go on from either of the last two steps."""
        found = {}
        for step, settings in ((self.step - 1, self._before), (self.step, self._settings())):
            if step >= 0 and settings is not None:
                answer = self._answers.get(step)
                found[step] = Progress(
                    step=step,
                    apply=None if answer is None else asdict(answer),
                    scheduler=_plain_or_none(settings.scheduler),
                    groups=[to_plain(group) for group in settings.groups],
                )
        return found

    def resume(self, proposal: Proposal) -> None:
        """Goes on from the proposal's step, with own memory of it where there is any.

        Raises:
            TrainerError: where the scheduler's state had to come from another worker and cannot travel.
        """
        resume = proposal.resume
        if resume == self.step:
            return
        if resume == self.step - 1 and self._before is not None:
            self._restore(self._before)
        elif proposal.progress is not None:
            progress = proposal.progress
            if self._scheduler is not None and progress.scheduler is None:
                raise TrainerError(
                    f"the state of {type(self._scheduler).__name__} cannot be sent to a worker that joins: it holds more than numbers"
                )
            scheduler = None if progress.scheduler is None else from_plain(progress.scheduler)
            self._restore(Settings(groups=[from_plain(group) for group in progress.groups], scheduler=scheduler))
            if progress.apply is not None:
                self._answers[resume] = Apply(**progress.apply)
        self.step, self._before = resume, None

    def begin(self, step: int, groups: list[dict[str, Any]], scheduler: dict[str, Any] | None) -> None:
        """Goes on behind `step`, which is in a checkpoint: with its groups' settings, and its scheduler's state if there is a scheduler."""
        if self._scheduler is not None and scheduler is None:
            raise TrainerError(f"the checkpoint has no state of a scheduler, and the Trainer has a {type(self._scheduler).__name__}")
        self._restore(Settings(groups=groups, scheduler=scheduler))
        self.step, self._before = step, None
        self._answers.clear()

    def settings(self) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """The groups' settings and the scheduler's state, as they are."""
        now = self._settings()
        return now.groups, now.scheduler

    def _settings(self) -> Settings:
        scheduler = None if self._scheduler is None else capture(self._scheduler.state_dict())
        return Settings(groups=[capture(group) for group in self._optimizer.settings()], scheduler=scheduler)

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
        for group, values in zip(self._optimizer.optimizer.param_groups, settings.groups, strict=True):
            group.update(revive(values, group))
        if self._scheduler is not None:
            self._scheduler.load_state_dict(revive(settings.scheduler, self._scheduler.state_dict()))


def _plain_or_none(state: dict[str, Any] | None) -> Any:
    try:
        return None if state is None else to_plain(state)
    except TypeError:
        return None
