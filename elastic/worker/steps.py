"""The step loop of one worker over all views: takes, yields and saves steps."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from elastic.engine import randomness
from elastic.engine.decision import Apply
from elastic.errors import TrainerError
from elastic.observe.activity import CHECKPOINT
from elastic.observe.step_log import Step, finite, utilization
from elastic.worker.checkpointing import Checkpoints
from elastic.worker.history import History
from elastic.worker.job import Job
from elastic.worker.loopsettings import Settings
from elastic.worker.report import Report
from elastic.worker.runtime import WorkerRuntime

T = TypeVar("T")


def told_to_the_job(run: Callable[[Steps, int], Iterator[Report]]) -> Callable[[Steps, int], Iterator[Report]]:
    """Decorates a step loop so that an exception that ends it is reported to the job, even if the user's code swallows it."""

    @functools.wraps(run)
    def told(self: Steps, steps: int) -> Iterator[Report]:
        reports = run(self, steps)
        try:
            while (report := self._job.during("runtime", next, reports, None)) is not None:
                self._job.heard()
                yield report
        except GeneratorExit:
            raise
        except BaseException as error:
            self._job.raised(error)
            raise
        finally:
            reports.close()  # type: ignore[attr-defined]
            self._job.steps.tell()

    return told


class Steps:
    """Takes a Trainer's steps. `batch_size` is in samples; `seed` keys the random numbers of loop bodies."""

    def __init__(
        self, job: Job, runtime: WorkerRuntime, history: History, checkpoints: Checkpoints | None, *, batch_size: int, seed: int
    ) -> None:
        self._job, self._runtime, self._history, self._checkpoints = job, runtime, history, checkpoints
        self._batch_size, self._seed = batch_size, seed
        self._saved, self._saved_with = -1, ""
        self._waited: tuple[object, float] = None, 0.0  # the copies for which steps have waited, and for how long until the last report
        self._unfinished: int | None = None  # the length of a loop that was left in its last body and still has to end
        self.first: int | None = None  # the first step that this worker has had
        self._ended = -1  # the length of its last loop
        self._received: Settings | None = None  # the job's settings where this worker has begun or joined, until it has had a step

    @told_to_the_job
    def take(self, steps: int) -> Iterator[Report]:
        """Takes steps until `steps` have been taken in all, and yields each one once."""
        self._finish()
        runtime = self._runtime
        runtime.handed_out()
        self._history.goes_on()
        self._keep_received()
        while True:
            runtime.catch_up()
            if runtime.step > steps:  # this worker has joined in a later loop
                runtime.at("end", steps - 1)
                self._end(steps)
                return
            self._history.registered.begin(warns=self._job.leader)
            decided = runtime.decision
            if runtime.unseen is not None:
                if runtime.settled():
                    yield from self._hand_out(runtime.handing_out(), steps)
            elif runtime.step >= steps or (decided is not None and decided.stop):
                if runtime.flush():
                    self._close(steps)
                    self._end(steps)
                    return
            elif runtime.pausing:
                if runtime.rest():
                    runtime.pause()
            else:
                self._take_step(final=runtime.step + 1 >= steps)

    def _end(self, steps: int) -> None:
        """Notes the end of a loop, and the settings with which this worker goes on if it has not had a step yet."""
        self._runtime.ended()
        self._ended = steps
        if self.first is None and self._received is None:
            self._received = self._history.settings()

    def _keep_received(self) -> None:
        """Drops what code between loops has set here, as long as this worker has had no step, if the job has set it already.

        It has if this worker joins, or goes on from a checkpoint in the middle of a loop. A checkpoint of a loop's end is from before the
        code behind that loop.
        """
        if self._received is not None and self.first is None and (self._job.joins or self._ended != self._history.step + 1):
            self._history.put_back(self._received)

    def _take_step(self, *, final: bool) -> None:
        """Computes and applies the next step; if members are lost, returns without applying it."""
        runtime, checkpoints = self._runtime, self._checkpoints
        message, due = None, False
        if checkpoints is not None:
            message, due = checkpoints.message(runtime.engine), checkpoints.due(self._history.step) and self._saved != self._history.step
            self._check_saved()
        answer = runtime.compute(message, save=due, final=final)
        if answer is None:
            return
        engine = runtime.engine
        if checkpoints is not None:
            checkpoints.heard(engine)
            if answer.save:
                runtime.saving()
                self._job.during(CHECKPOINT, checkpoints.save, self._history.step, runtime, self._history)
        if runtime.engine is engine:  # else members were lost when a save began, and the step must be computed again
            runtime.apply(answer)

    def save(self) -> None:
        """Saves the state after the newest step (`Trainer.save`)."""
        if self._checkpoints is None:
            raise TrainerError("save() has no directory to save to: give the Trainer, or job.prepare, checkpoint=")
        self._finish()
        runtime = self._runtime
        if runtime.amid:
            runtime.complete()
            self._save_now()
            self._saved_with = self._history.digest()
        elif runtime.begins:
            raise TrainerError("save() is called before the first step of this job: call it in a loop body, or after a loop")

    def is_not_saved(self) -> None:
        """Notes that the last save has failed: what the body changes later is in no checkpoint."""
        self._saved_with = ""

    def _save_now(self) -> None:
        step = self._history.step
        if self._checkpoints is not None and self._saved != step:
            self._job.during(CHECKPOINT, self._checkpoints.save_last, step, self._runtime, self._history)
            self._saved = step

    def _check_saved(self) -> None:
        """Warns if a loop body has changed settings after its `save`."""
        saved_with, self._saved_with = self._saved_with, ""
        if saved_with and self._saved == self._history.step and saved_with != self._history.digest():
            warnings.warn(
                f"the loop body of step {self._saved} has changed settings after save(), so the checkpoint does not have the "
                "changes: call save() last in the body",
                stacklevel=2,
            )

    def left(self, value: Any) -> None:
        """Saves the last step of a loop that was left early, after `train_fn` has returned `value`.

        A save needs all workers, so it is not done when the loop is left: errors raised in a generator that is closed are lost.
        """
        early = self._checkpoints is not None and self._runtime.amid and self._saved != self._history.step
        if self._job.leader and (early or self._unfinished is not None):  # if this worker dies, the next leader may have no value to return
            self._job.send({"type": "returned", "value": value})
        if self._unfinished is not None:
            self._finish()
        elif early:
            self._runtime.leaves = True
            self._runtime.complete()
            self._save_now()

    def _finish(self) -> None:
        """Takes part in the end of a loop that was left in its last body: workers that did not leave it wait there."""
        steps, self._unfinished = self._unfinished, None
        if steps is not None and self._runtime.amid:
            for _ in self.take(steps):
                pass

    def together(self, collective: Callable[[], T], *, ends_together: bool = True) -> T:
        """Runs a collective of all members, after the end of a loop that was left in its last body."""
        self._finish()
        return self._runtime.together(collective, ends_together=ends_together)

    def _close(self, steps: int) -> None:
        """Saves the state after the last step, if this job has taken it."""
        step = self._history.step
        if step < steps and self._runtime.decision is not None:
            self._save_now()
        self._runtime.at("end", min(step, steps - 1))

    def _hand_out(self, answer: Apply, steps: int) -> Iterator[Report]:
        self.first = answer.step if self.first is None else self.first
        randomness.seed_all(self._seed, "loop", answer.step)  # the loop's own draws must not depend on the layout
        if answer.skipped is not None:  # every worker reports it, as any may die; the agent counts it once
            self._job.send({"type": "skipped", "step": answer.step, "reason": answer.skipped})
        try:
            report = self._report(answer)
            self._note(answer, report, steps)
            yield report
        except GeneratorExit:
            if self._runtime.amid and (answer.stop or answer.step + 1 >= steps):
                self._unfinished = steps
            raise
        self._runtime.handed_out()

    def _note(self, answer: Apply, report: Report, steps: int) -> None:
        view = self._runtime.engine.view
        self._job.steps.note(
            Step(
                step=answer.step,
                at=round(time.time(), 3),
                loss=finite(answer.loss),
                lr=answer.lr,
                grad_norm=finite(answer.norm),
                seconds=finite(self._history.seconds_of(answer.step)),
                samples=self._batch_size,
                tokens=answer.tokens,
                epoch=report.epoch,
                workers=report.workers,
                layout=report.layout,
                of=steps,
                stopped=answer.stop,
                skipped=answer.skipped,
                flops=view.workload.flops,
                peak_flops=view.peak_flops,
            )
        )

    def _report(self, answer: Apply) -> Report:
        seconds = self._history.seconds_of(answer.step)
        view = self._runtime.engine.view
        return Report(
            step=answer.step,
            loss=answer.loss,
            lr=answer.lr,
            grad_norm=answer.norm,
            samples_per_second=self._batch_size / seconds,
            tokens_per_second=answer.tokens / seconds,
            epoch=view.epoch,
            workers=len(view.members),
            layout=view.plan.summary,
            leader=self._job.leader,
            stopped=answer.stop,
            skipped=answer.skipped,
            copy_wait_s=self._copy_wait_s(),
            mfu=utilization(view.workload.flops, finite(seconds), view.peak_flops),
        )

    def _copy_wait_s(self) -> float:
        """Returns how long steps have waited for copies since this was called last."""
        copies = self._runtime.engine.previous_copies
        before = self._waited[1] if self._waited[0] is copies else 0.0
        self._waited = copies, copies.waited_s
        return copies.waited_s - before
