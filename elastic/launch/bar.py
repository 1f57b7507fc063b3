"""A progress bar on the terminal of the program that has started a job: one line, at its bottom."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from elastic.observe.console import CLEARS_LINE
from elastic.observe.encodings import encodable
from elastic.observe.step_log import Step

_EVERY_S = 0.25


def on_terminal(stream: TextIO | None = None) -> bool:
    """Whether a bar can be drawn on stderr."""
    console = Console(file=stream or sys.stderr)
    return console.is_terminal and not console.is_dumb_terminal


class Bar:
    """Draws the newest step. Whatever else is printed clears the line first (`Console.lead`, `KeptStream`)."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._clock, self._drawn_at = clock, -_EVERY_S
        self._begun: tuple[int, float] | None = None  # the first step seen, and when
        self._step: Step | None = None

    def seen(self, message: Mapping[str, Any]) -> None:
        if message["what"] == "steps":
            self._step, now = Step.from_row(message["rows"][-1]), self._clock()
            self._begun = self._begun or (self._step.step, now)
            if now - self._drawn_at >= _EVERY_S:
                self._draw(now)

    def close(self) -> None:
        """Leaves the last state on the terminal."""
        if self._step is not None:
            self._draw(self._clock())
            self._console.file.write("\n")
            self._console.file.flush()

    def _draw(self, now: float) -> None:
        self._drawn_at = now
        with self._console.capture() as captured:
            self._console.print(self.line(now), end="")
        self._console.file.write(CLEARS_LINE + encodable(captured.get().rstrip("\n"), self._console.file))
        self._console.file.flush()

    def line(self, now: float) -> Table:
        """Returns the line: done of all, bar, loss, speed, workers, time left."""
        step = self._step
        assert step is not None
        speed = f"{step.tokens_per_second:,.0f} tokens/s" if step.tokens else f"{step.samples_per_second:,.1f} samples/s"
        loss = "loss ?" if step.loss is None else f"loss {step.loss:.4f}"
        table = Table.grid(padding=(0, 1), expand=False)
        table.add_column(no_wrap=True)
        table.add_column(width=20)
        table.add_column(no_wrap=True, overflow="ellipsis")
        words = [loss, speed, f"{step.workers} worker{'s' * (step.workers != 1)}", step.layout, self._left(now, step)]
        table.add_row(f"{step.step + 1}/{step.of}", ProgressBar(total=step.of, completed=step.step + 1), Text("  ".join(words)))
        return table

    def _left(self, now: float, step: Step) -> str:
        first, began = self._begun or (step.step, now)
        done, rest = step.step - first, step.of - 1 - step.step
        if not done:
            return ""
        seconds = round((now - began) / done * rest)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
