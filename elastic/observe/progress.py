"""One live line about a running job; if the output is not a terminal, a line every few seconds."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console

from elastic.observe.incident import counted

LINES_EVERY_S = 5.0


class StepLike(Protocol):
    """The figures of one committed step: `elastic.Report` is one."""

    @property
    def step(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def samples_per_second(self) -> float: ...
    @property
    def tokens_per_second(self) -> float: ...
    @property
    def epoch(self) -> int: ...
    @property
    def workers(self) -> int: ...
    @property
    def layout(self) -> str: ...
    @property
    def leader(self) -> bool: ...


def describe(report: StepLike, steps: int) -> str:
    """Formats a report, such as `12 of 40 steps done  loss 3.1416  5,210 tokens/s  epoch 1  4 workers  [0-4]x2 [5-9]x2`."""
    tokens = report.tokens_per_second
    speed = f"{tokens:,.0f} tokens/s" if tokens else f"{report.samples_per_second:,.1f} samples/s"
    people = counted(report.workers, "worker")
    return f"{report.step + 1} of {steps} steps done  loss {report.loss:.4f}  {speed}  epoch {report.epoch}  {people}  {report.layout}"


class ProgressLine:
    """Shows the leader's reports, and nothing on other workers."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self._steps = steps
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._shown_at = 0.0

    def show(self, report: StepLike) -> None:
        """Replaces the line on a terminal; elsewhere prints the first and last step and one every few seconds."""
        if not report.leader:
            return
        last = report.step + 1 == self._steps
        line = describe(report, self._steps)
        if self._console.is_terminal:
            self._console.print(f"\r\x1b[2K{line}", end="\n" if last else "", markup=False)
        elif last or report.step == 0 or time.monotonic() - self._shown_at >= LINES_EVERY_S:
            self._console.print(line, markup=False)
            self._shown_at = time.monotonic()
