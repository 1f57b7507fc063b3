"""The plain loop of one worker: what the loader returns next, and what the body's calls do.

The loader gives a body each micro-batch that this worker has of a step. `optimizer.step()` at the end of a body hands its loss and
gradients to the engine, and returns when the engine needs the next body, or has committed the step. So behind the `optimizer.step()` of a
step's last body parameters are updated, as in a plain loop; there, and only there, `loader.report` is not None.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Enum, auto
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from elastic.engine import randomness
from elastic.engine.bit_equality import same
from elastic.engine.profile import LayerProfile
from elastic.errors import TrainerError
from elastic.memory import device
from elastic.observe.activity import TRAIN_FN
from elastic.script.sources import is_own
from elastic.worker.after_return import NoStepLeft
from elastic.worker.job import Job
from elastic.worker.plain import backwards
from elastic.worker.plain.body import body_of, checksum, handed_over, take_gradients
from elastic.worker.plain.iteration import ONE, Iteration, Kind
from elastic.worker.plain.passes import Passes
from elastic.worker.plain.source import Stream
from elastic.worker.plain.trainer import PlainTrainer
from elastic.worker.plain.trial import Trial
from elastic.worker.plain.turns import Committed, Ended, Event, Turns, Work
from elastic.worker.report import Report

Make = Callable[[nn.Module, LayerProfile, Sequence[float | None]], PlainTrainer]
"""Makes the Trainer of a body, with its cost and the norm to clip to in each of its parts."""


_EMPTY, _EMPTY_STOPPED = 100_000, 1_000
"""So many loops without a step, in a row, are one that does not end: in a job that goes on, and in one that stops."""


class Place(Enum):
    """Where the user's code is."""

    OUTSIDE = auto()  # before, between or after loops
    BODY = auto()  # in a body, before its optimizer.step()
    TAIL = auto()  # behind it, in the middle of a step
    COMMITTED = auto()  # behind it, and the step is committed


@dataclass(frozen=True, slots=True)
class _Done:
    """What a body has computed."""

    loss: torch.Tensor
    gradients: Any
    weight: float | None


class Losses:
    """The losses of the updates of the present step so far, which workers that join and checkpoints get."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.found)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.found = list(state["losses"])


class Loop:
    """The state of one worker's plain loop over all passes. `make` makes the Trainer when a body has been tried out.

    `parameters` are those of each optimizer; `optimizer` is that one, or all of them as one. If a body has several parts, each is a step of
    the engine's, and the body runs again for each: what belongs to other parts than the live one is computed, and does not count.
    """

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        optimizer: Optimizer,
        parameters: Sequence[Sequence[nn.Parameter]],
        stream: Stream,
        make: Make,
        seed: int,
        *,
        exact: bool,
    ) -> None:
        self._exact = exact
        self._job, self._model, self._optimizer, self._stream, self._make, self._seed = job, model, optimizer, stream, make, seed
        self._parameters, self._several, self._parts = parameters, len(parameters) > 1, ONE
        self._trial: Trial | None = None
        self.losses = Losses()
        self._dark = ExitStack()
        self._body = body_of(model, self._compute)
        self._turns = Turns()
        self._trainer: PlainTrainer | None = None
        self._now: Iteration | None = None
        self._event: Event | None = None
        self._report: Report | None = None
        self._clip_norms: list[float | None] = []
        self._weighs: list[bool] = []
        self._groups: list[dict[str, Any]] = []
        self._trained = list(model.parameters())
        self._tail: Any = None  # states of generators behind bodies
        self._inside: str | None = None  # the place of the code to go back to, in the middle of a step
        self._broken: TrainerError | None = None
        self.place = Place.OUTSIDE
        self.stopped = False  # whether the job stops after the newest step
        self._empty = 0  # passes without a step, in a row
        self.took = True  # whether this worker has committed a step in the last pass, or there was none yet
        self.resumed_at: int | None = None  # the step at which the job goes on from a checkpoint
        self._behind: Callable[[Any], None] | None = None
        backwards.hear(self._goes_backward, self._went_backward, self._skips_backward)
        job.behind = self._returned

    @property
    def report(self) -> Report | None:
        """The report of the step that has just been committed; None elsewhere."""
        return self._report if self.place is Place.COMMITTED else None

    def trainer(self, call: str) -> PlainTrainer:
        """Returns the Trainer, for a collective call. Raises TrainerError where not all workers can make one."""
        self._check()
        if self.place in (Place.BODY, Place.TAIL):
            raise TrainerError(
                f"{call} is called in the middle of a step, of which each worker runs other bodies: call it behind optimizer.step(), under "
                "`if loader.report is not None:`, or after the loop; on every worker"
            )
        if self._trainer is None:
            raise TrainerError(f"{call} is called before the first step: the job's workers do not know each other yet. Call it later")
        return self._trainer

    @property
    def kind(self) -> Kind | None:
        """What becomes of the gradients of the body that runs; None if none does."""
        return None if self._now is None else self._now.kind

    @property
    def body_step(self) -> int | None:
        """The step whose body runs; None outside of bodies, and in a trial, which counts for no step."""
        return None if self._now is None or self._now.kind is Kind.TRIAL else self._now.step

    @property
    def warns(self) -> bool:
        """Whether this worker warns of what all have in common."""
        return self._job.profile

    @property
    def built(self) -> bool:
        """Whether there is a Trainer."""
        return self._trainer is not None

    @property
    def taken(self) -> int:
        """The number of steps that have been taken in all, and handed out here or elsewhere; 0 before this worker has joined."""
        if self._trainer is None:
            return 0
        comes = self._now is not None and self._now.kind is Kind.EXTRA and self.place is not Place.COMMITTED
        return self._trainer.handed_out // len(self._parts) - comes  # without a step that this body is to hand out

    def run(self, passes: Passes, number: int) -> Iterator[Any]:
        """Yields micro-batches for bodies until the pass with this number ends."""
        self._check()
        self._trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        if self.place is not Place.OUTSIDE:
            raise TrainerError("a loop over the loader begins inside of another one: each step is taken by one loop")
        try:
            if self._trainer is None:
                self._trial = trial = Trial(self._job, self._body, self._stream, self._seed, self._parameters, exact=self._exact)
                yield from trial.run(self._open, self._close)
                self._parts, self._clip_norms, self._weighs = trial.parts, trial.clip_norms, trial.weighs
                self._stream.updates = len(self._parts)
                self._trainer = self._make(self._body, trial.cost, self._clip_norms)
                if len(self._parts) > 1:
                    self._trainer.register_for_checkpointing(self.losses)
                if passes.whole:
                    self._trainer.register_for_checkpointing(passes)
                if self._exact:
                    self._trainer.compare(self._sample)
                self._job.behind, self._behind = self._returned, self._job.behind
                if not self._job.joins:
                    self.resumed_at = self.taken or None
            if not self.stopped:
                self._stream.begin_pass()
            self._trainer.begin_pass()
            end = passes.end(number)  # known now, also to a worker that has joined
            self._tail, self.took = self.states(), False
            self._event = self._turns.begin(lambda: self._engine(end * len(self._parts)))
            while not isinstance(event := self._next(), Ended):
                yield from self._extra(event) if isinstance(event, Committed) else self._work(event)
            self._empty = 0 if self.took else self._empty + 1
            if not self.took:  # a checkpoint of this pass's end lacks what the code behind it does
                self.took = self.resumed_at == end
            self._check_empty(end)
        except GeneratorExit:
            self._left()
            if self.place is Place.COMMITTED:
                passes.left(number, self.taken)
            raise
        finally:
            self.place = Place.OUTSIDE

    def _check_empty(self, end: int) -> None:
        """Raises an error if loops begin again and again although no step is left, as in `while True: for x, y in loader`."""
        if self.stopped and self._empty >= _EMPTY_STOPPED:
            raise NoStepLeft
        if self._empty >= _EMPTY:
            raise TrainerError(
                f"the last {_EMPTY} loops over the loader had no step, since {end} have been taken, which are all: leave the loop around "
                "them by loader.report.step, and give job.prepare steps= at least as many"
            )

    def _engine(self, end: int) -> None:
        """The engine's greenlet: takes steps."""
        assert self._trainer is not None
        reports = self._trainer.run(end)
        try:
            for report in reports:
                step, part = divmod(report.step, len(self._parts))
                self.losses.found = [*(self.losses.found if part else []), report.loss]
                if part < len(self._parts) - 1:
                    self.stopped = report.stopped
                    continue
                self._trainer.complete()
                if len(self._parts) > 1:
                    rates = {name: getattr(report, name) / len(self._parts) for name in ("samples_per_second", "tokens_per_second")}
                    report = replace(report, step=step, losses=tuple(self.losses.found), **rates)
                self._turns.to_user(Committed(report=report))
        finally:
            reports.close()  # type: ignore[attr-defined]

    def _compute(self, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The forward of the one layer, called by the engine: the micro-batch's loss, and its weight if the body has given one."""
        if not self._turns.in_engine:
            raise TrainerError(
                "a step must be computed again, which is the body of the loop, but the loop is in another call or was left: state was lost "
                "on several workers at once. Start the job again: it continues from its checkpoint, if it has one"
            )
        step, micro_batch = key.tolist()
        contents = self._stream.taken(step, micro_batch)
        done = self._turns.to_user(Work(step=step, micro_batch=micro_batch, contents=contents, states=self.states()))
        weight = None if done.weight is None else torch.tensor(done.weight, dtype=torch.float64)
        return handed_over(done.loss, done.gradients), weight

    def _sample(self, step: int) -> str | None:
        """Runs a body on the first micro-batch of a step, whichever worker has that one. Returns a checksum of its loss and gradients.

        None if no body can be run, since the step is taken again while one runs.
        """
        assert self._trainer is not None
        if not self._turns.in_engine:
            return None
        self._job.enter("forward", step, 0)
        with randomness.kept(), self._trainer.unrecorded():
            contents = self._stream.load(step // len(self._parts), 0)
            randomness.seed_all(self._seed, step, 0, 0)
            done = self._turns.to_user(Work(step=step, micro_batch=0, contents=contents, states=self.states()))
        return checksum([done.loss, *(gradient for _, gradient in done.gradients)])

    def states(self) -> Any:
        """Returns the states of the generators that a step keys."""
        return randomness.states(others=self._trainer is None or self._trainer.keys_all)

    def _next(self) -> Event:
        event, self._event = self._event, None
        return self._to_engine(None) if event is None else event

    def _to_engine(self, value: Any) -> Event:
        self.place, now = Place.OUTSIDE, self.place
        frozen = [parameter for parameter in self._trained if not parameter.requires_grad] if self._several else []
        try:
            for parameter in frozen:  # by the body, for a loss that must not train them: no change of what is trained
                parameter.requires_grad_(True)
            return self._turns.to_engine(value)
        finally:
            self.place = now
            for parameter in frozen:
                parameter.requires_grad_(False)

    def _work(self, event: Work) -> Iterator[Any]:
        randomness.put_back(event.states)
        step, live = divmod(event.step, len(self._parts))
        if len(self._parts) > 1:  # all runs of a body draw the same
            randomness.seed_all(self._seed, step, event.micro_batch, 0)
        self._open(Iteration(kind=Kind.WORK, step=step, micro_batch=event.micro_batch, parts=self._parts, live=live))
        yield event.contents
        self._close()

    def _extra(self, event: Committed) -> Iterator[Any]:
        """Gives a body to a worker that had no micro-batch in a committed step: its loop must see each step too."""
        assert self._trainer is not None
        step = event.report.step
        with ExitStack() as stack:
            stack.enter_context(self._trainer.unrecorded())
            contents = self._stream.load(step, 0)
            randomness.seed_all(self._seed, step, 0, 0)
            self._report = event.report
            self._open(Iteration(kind=Kind.EXTRA, step=step, micro_batch=0, parts=self._parts, live=None if self._several else 0))
            self._extra_ends = stack.pop_all()
        yield contents
        self._close()

    def _open(self, iteration: Iteration) -> None:
        self._now, self.place = iteration, Place.BODY
        self._groups = [dict(group) for group in self._optimizer.param_groups]
        if self._several:
            take_gradients(self._trained)
        self._shade(iteration)
        iteration.began = self._clock()

    def _shade(self, now: Iteration) -> None:
        """Keeps running statistics of the part of the body that begins only if it is live: other runs of the body keep the others'."""
        self._dark.close()
        if now.kind is Kind.WORK and not now.lives:
            assert self._trainer is not None
            self._dark.enter_context(self._trainer.unrecorded_amid())

    def _close(self) -> Iteration:
        now = self._now
        assert now is not None  # a body has run
        if self._trainer is not None:
            self._trainer.check_shown()
        now.check_end()
        self._now = None
        self._dark.close()
        if self._several:
            take_gradients(self._trained)
        if self.place is Place.TAIL:
            self._check_settings(now)
            if now.lives:
                self._tail = self.states()
        if self._inside is not None:
            self._job.at(self._inside)
            self._inside = None
        self.place = Place.OUTSIDE
        return now

    def _goes_backward(self) -> bool:
        if self._now is None or self._turns.in_engine:
            return False
        self._now.goes_backward(self._trained)
        if self._now.parts is None:
            self.place = Place.BODY
        if self._now.backward_at is None and self._now.lives:
            self._now.backward_at = self._clock()
        return True

    def _skips_backward(self) -> bool:
        """Whether the gradients of a backward are not needed: the body runs for those of another part."""
        return self._several and self._now is not None and not self._now.lives

    def _went_backward(self, loss: torch.Tensor) -> None:
        assert self._now is not None
        self._now.went_backward(loss, self._trained)

    def clip(self, max_norm: float) -> None:
        """`job.clip_grad_norm_`."""
        if not max_norm > 0:
            raise TrainerError(f"job.clip_grad_norm_({max_norm}): max_norm must be above 0")
        if self._now is None:
            raise TrainerError("job.clip_grad_norm_() is called outside the body of a loop over the loader: call it after backward()")
        self._now.clips(float(max_norm))

    def weighted(self, loss: torch.Tensor, weight: Any) -> torch.Tensor:
        """`job.weighted`."""
        if self._now is None:
            raise TrainerError("job.weighted() is called outside the body of a loop over the loader: call it before backward()")
        return self._now.weighted(loss, float(weight))

    def step(self, optimizer: int) -> None:
        """`optimizer.step()` of the optimizer with this number: ends the body's part in the step, or in one of its updates."""
        self._check()
        now = self._now
        if now is None:
            raise TrainerError("optimizer.step() is called outside a loop over the loader that job.prepare returned: call it in its body")
        now.steps(optimizer, self._parameters[optimizer])
        if now.lives:
            now.ended = self._clock()
        if now.kind is Kind.TRIAL:
            self._tried(now, optimizer)
        elif now.part_ended:
            self._check_part(now)
            if now.kind is Kind.EXTRA:
                self._end_extra(now)
            else:
                self._end_part(now)

    def _tried(self, now: Iteration, optimizer: int) -> None:
        assert self._trial is not None  # it opened the body
        self._trial.stepped(now, optimizer)
        if now.part_ended and not now.over:
            now.next_part()
        elif now.over:
            self.place = Place.TAIL
            if not self._several:
                take_gradients(self._trained)

    def _check_part(self, now: Iteration) -> None:
        """Raises TrainerError if a part of a body clips or weighs in another way than in the first body, or has changed settings."""
        part, norm, weighs = now.part, self._clip_norms[now.number], self._weighs[now.number]
        if part.clip_norm != norm:
            raise TrainerError(
                f"{now.where} {_clips(part.clip_norm)}, but the first one {_clips(norm)}: an update has one norm, in all steps, so "
                "every body must call job.clip_grad_norm_ with the same max_norm"
            )
        if (part.weight is not None) != weighs:
            raise TrainerError(
                f"{now.where} {'calls' if part.weight is not None else 'does not call'} job.weighted(), and the first one "
                f"{'did' if weighs else 'did not'}: all micro-batches of a step are weighed, or none. The weight may be 0"
            )
        self._check_settings(now)

    def _end_extra(self, now: Iteration) -> None:
        if not now.over:
            now.next_part()
            return
        self._extra_ends.close()
        randomness.seed_all(self._seed, "loop", (now.step + 1) * len(self._parts) - 1)
        self._committed()

    def _end_part(self, now: Iteration) -> None:
        """Hands loss and gradients of the live part to the engine."""
        lives, over = now.lives, now.over
        if lives:
            gradients = take_gradients(self._trained if not self._several else self._stepped_parameters(now))
            take_gradients(self._trained)  # those that a loss has for parameters of other optimizers
            event = self._to_engine(_Done(now.part.total(), gradients, now.part.weight))
            if over and isinstance(event, Committed):
                self._report = event.report
                self._committed()
                return
            self._event = event
            self._inside = self._job.at(TRAIN_FN)  # code behind the body is no layer's: it may take long
        if over:
            self.place = Place.TAIL
            if lives:
                randomness.put_back(self._tail)
        else:
            now.next_part()
            self._shade(now)

    def _stepped_parameters(self, now: Iteration) -> list[nn.Parameter]:
        return [parameter for optimizer in now.part.stepped for parameter in self._parameters[optimizer]]

    def _committed(self) -> None:
        self.place, self.took = Place.COMMITTED, True
        self.stopped = self._report is not None and self._report.stopped

    def _check_settings(self, now: Iteration) -> None:
        """Raises TrainerError if the body has changed settings of the step under way."""
        for number, (before, group) in enumerate(zip(self._groups, self._optimizer.param_groups, strict=True)):
            for name, value in group.items():
                if name != "params" and not (name in before and same(before[name], value)):
                    raise TrainerError(
                        f"{now.where} changes {name} of parameter group {number} in the middle of the step: a step has one value, and each "
                        "worker runs other bodies. Change settings where loader.report is not None, by loader.report.step"
                    )

    def zero_grad(self, optimizer: int, set_to_none: bool = True) -> None:
        """`optimizer.zero_grad()`: drops the gradients that backwards have left in the model, or in the optimizer's part of it."""
        if not self._several:
            if any(parameter.grad is not None for parameter in self._trained):
                self._model.zero_grad(set_to_none)
        elif set_to_none:
            take_gradients(self._parameters[optimizer])
        else:
            for parameter in self._parameters[optimizer]:
                if parameter.grad is not None:
                    parameter.grad.zero_()

    def _clock(self) -> float:
        return time.thread_time() if self._job.gpu is None and device.on_host() else device.clock()

    def _left(self) -> None:
        """Notes that the loop was left by `break`, `return` or an exception. Errors cannot be raised here: Python drops them."""
        if self.place is Place.COMMITTED:
            self._turns.leave()
        elif self._now is not None:
            if self._trainer is None and not self._now.part.losses:
                self._broken = TrainerError(
                    f"a micro-batch was taken from the loader, and no step made with it{_left_at(sys._getframe())}, as next(iter(loader)) "
                    "does: all of them count in a step. To look at one, take it from your own DataLoader or dataset, before job.prepare"
                )
            else:
                self._broken = TrainerError(
                    f"the loop was left in {self._now.where}, in the middle of the step, which others cannot take without this worker"
                    f"{_left_at(sys._getframe())}. Leave it where loader.report is not None, after the same step on every worker: decide "
                    "by a value that all have, such as loader.report.loss"
                )
            self._job.raised(self._broken)

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _returned(self, value: Any) -> None:
        self._check()
        if self._trainer is not None and self._behind is not None:
            self._behind(value)


def _left_at(frame: FrameType | None) -> str:
    while frame is not None and not is_own(frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else f" (at {frame.f_code.co_filename}:{frame.f_lineno})"


def _clips(norm: float | None) -> str:
    return "does not clip gradients" if norm is None else f"clips gradients to a norm of {norm}"
