"""The file `steps.jsonl` of a run directory: one line per committed step; in a long run, one for every 2nd, 4th, ... of later steps.

After each LINES lines, only half as many of the steps that follow are written, so the file of a million steps has 7 MB. Each line stands
for the steps since the line before: its loss and seconds are their means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from elastic.observe import records

LINES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One committed step; values that are not finite numbers are None.

    `at` is the time of day when it was handed out, `seconds` how long it took, `of` the number of steps of the loop. `samples` and `tokens`
    are those of its batch (0 tokens: unknown). `flops` is the number of floating-point operations that the model needs for it, and
    `peak_flops` what all devices together can do in a second; 0 if unknown.
    """

    step: int
    at: float
    loss: float | None
    lr: float
    grad_norm: float | None
    seconds: float | None
    samples: int
    tokens: int
    epoch: int
    workers: int
    layout: str
    of: int
    stopped: bool = False
    skipped: str | None = None
    flops: int = 0
    peak_flops: float = 0.0

    def to_row(self) -> list[Any]:
        """Returns the values in the order of the fields."""
        return [getattr(self, name) for name in self.__dataclass_fields__]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Step:
        """The inverse of `to_row`."""
        return cls(**dict(zip(cls.__dataclass_fields__, row, strict=True)))

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def flops_per_second(self) -> float:
        """Achieved floating-point operations a second; 0.0 if unknown."""
        return self.flops / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization, from 0 to 1; None if it is unknown."""
        return utilization(self.flops, self.seconds, self.peak_flops)


def utilization(flops: float, seconds: float | None, peak_flops: float) -> float | None:
    """Returns the share of the peak that was achieved; None if operations, seconds or peak are unknown."""
    return flops / seconds / peak_flops if flops and seconds and peak_flops else None


def finite(value: float) -> float | None:
    """Returns the value, None if it is infinite or not a number: JSON has no such numbers."""
    return value if math.isfinite(value) else None


class StepLog:
    """Writes the steps of one job. `new` drops those that were heard before: each step is written once, also if it is taken again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.newest: Step | None = None
        self._stride, self._lines = 1, 0
        self._since: list[Step] = []

    def new(self, steps: Iterable[Step], **more: Any) -> list[Step]:
        """Writes those steps that are new, with `more` fields, and returns them."""
        found: list[Step] = []
        for step in steps:
            if self.newest is None or step.step > self.newest.step:
                self.newest = step
                found.append(step)
        self._write(found, more)
        return found

    def _write(self, steps: Iterable[Step], more: Mapping[str, Any]) -> None:
        lines = []
        for step in steps:
            self._since.append(step)
            if len(self._since) >= self._stride or step.skipped is not None or step.step + 1 == step.of:
                lines.append({**asdict(_joined(self._since)), **more})
                self._since = []
                self._lines += 1
                if self._lines % LINES == 0:
                    self._stride *= 2
        if lines:
            records.own.append(self._path, lines)


def _joined(steps: Sequence[Step]) -> Step:
    if len(steps) == 1:
        return steps[0]
    means = {name: _mean([getattr(step, name) for step in steps]) for name in ("loss", "grad_norm", "seconds")}
    return replace(steps[-1], **means)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
