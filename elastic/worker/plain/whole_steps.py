"""Takes a step with all its bodies in one call: for a framework, whose loop has one turn for each update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from elastic.engine import randomness
from elastic.errors import TrainerError
from elastic.worker.plain.iteration import Kind
from elastic.worker.plain.loader import Loader
from elastic.worker.plain.optimizer import PreparedOptimizer
from elastic.worker.report import Report

Body = Callable[[Any], None]
"""Computes forward, loss and backward of a micro-batch."""


class WholeSteps:
    """The steps of a loader that `job.prepare` returned with `optimizer`. `body` runs for each micro-batch that this worker has of a step.

    `report` is the report of the newest step that this worker has taken, None before the first one.
    """

    def __init__(self, loader: Loader, optimizer: PreparedOptimizer, body: Body) -> None:
        self._loop, self._loader, self._optimizer, self._body = loader.loop, loader, optimizer, body
        self._bodies: Iterator[Any] = iter(())
        self._first: tuple[Any, Any] | None = None  # the first micro-batch that counts, and the states of generators for its body
        self.report: Report | None = None

    def begin(self) -> int:
        """Tries the body out and joins the job. Returns how many steps have been taken in all, before this worker's first one."""
        self._bodies = iter(self._loader)
        for contents in self._bodies:
            if self._loop.kind is not Kind.TRIAL:
                self._first = contents, self._loop.states()
                break
            self._run(contents)
        return self._loop.taken

    def take(self) -> Report:
        """Takes the next step; returns its report when it is committed.

        Raises:
            TrainerError: if there is none, because all steps are taken or the job stops.
        """
        if self._first is not None:
            contents, states = self._first
            self._first = None
            randomness.put_back(states)  # the framework may have drawn since
            self._run(contents)
        while (report := self._loader.report) is None or report is self.report:
            contents = next(self._bodies, self)
            if contents is self:
                raise TrainerError("the framework's loop asks for a step after the last one: let it end where the job does")
            self._run(contents)
        self.report = report
        return report

    def end(self) -> None:
        """Ends the loop behind the newest step. Every worker does this after the same step."""
        self._bodies.close()  # type: ignore[attr-defined]

    def _run(self, contents: Any) -> None:
        self._body(contents)
        self._optimizer.step()
        self._optimizer.zero_grad()
