"""When steps were committed, as every training process writes it down; and how long a kill stalled them: one measure for all sides."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

_RECENT_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCommit:
    """Step `step` counts since `at` (time.monotonic()), for the process `pid` at `place`.

    `attempt_id` is another one after every change of the members, `members` how many have contributed to the step.
    """

    place: int
    pid: int
    step: int
    at: float
    attempt_id: int
    members: int
    loss: float


class CommitLog:
    """The commits that this process sees, in a file of its own that outlives it."""

    def __init__(self, directory: Path | str, place: int) -> None:
        self._place, self._pid = place, os.getpid()
        path = Path(directory, f"commits-{place}-{self._pid}.jsonl")
        self._file = path.open("a", buffering=1)

    def __enter__(self) -> CommitLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, *, step: int, attempt_id: int, members: int, loss: float) -> None:
        """Now."""
        line = {
            "place": self._place,
            "pid": self._pid,
            "step": step,
            "at": time.monotonic(),
            "attempt_id": attempt_id,
            "members": members,
            "loss": loss,
        }
        self._file.write(json.dumps(line) + "\n")


def read_commits(directory: Path | str) -> list[StepCommit]:
    """Of all processes so far, by time."""
    return sorted((StepCommit(**line) for line in read_lines(Path(directory), "commits-*.jsonl")), key=lambda commit: commit.at)


def read_lines(directory: Path, pattern: str) -> list[dict[str, Any]]:
    """The JSON lines of these files; a last line without its end is still being written, and left out."""
    lines = (line for path in sorted(directory.glob(pattern)) for line in path.read_text().splitlines(keepends=True))
    return [json.loads(line) for line in lines if line.endswith("\n")]


def first_of_each_step(commits: Iterable[StepCommit]) -> list[StepCommit]:
    """One for each step of each view: when the first process saw it."""
    first: dict[tuple[int, int], StepCommit] = {}
    for commit in commits:
        first.setdefault((commit.attempt_id, commit.step), commit)
    return sorted(first.values(), key=lambda commit: commit.at)


def pace(commits: Sequence[StepCommit], at: float) -> float | None:
    """Seconds a step at a time: the median of the last few that as many members took as the newest one, each within one view."""
    seen = [commit for commit in commits if commit.at <= at]
    steps = [
        after.at - before.at
        for before, after in pairwise(seen)
        if before.attempt_id == after.attempt_id and after.members == seen[-1].members and after.step == before.step + 1
    ]
    return statistics.median(steps[-_RECENT_STEPS:]) if steps else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """Seconds.

    stall: how much later than without the fault the first step after the recovery was committed. silence: how long none was.
    lost: from the last commit of the view until the fault, 0 where the step in flight was still committed. step: what a step took before.
    """

    stall: float
    silence: float
    lost: float
    step: float


def stall(fault: float, commits: Sequence[StepCommit]) -> Stall | None:
    """From `first_of_each_step`; None where the pace before is not known, or nothing was committed after.

    A commit that comes after the fault but is of the view before was on its way already.
    """
    step_s = pace(commits, fault)
    before = [commit for commit in commits if commit.at <= fault]
    if step_s is None or not before:
        return None
    attempt_id = before[-1].attempt_id
    after = next((commit for commit in commits if commit.at > fault and commit.attempt_id > attempt_id), None)
    if after is None:
        return None
    last = [commit for commit in commits if commit.at < after.at and commit.attempt_id == attempt_id][-1]
    ahead = after.step - last.step
    due = max(fault, last.at + ahead * step_s) if ahead > 0 else last.at  # where the last step had to be taken again, nothing was due later
    return Stall(stall=max(0.0, after.at - due), silence=after.at - last.at, lost=max(0.0, fault - last.at), step=step_s)


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median, 95th percentile (between neighbours, linearly), least and most; None where nothing is known."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    place = 0.95 * (len(known) - 1)
    low = int(place)
    p95 = known[low] + (place - low) * (known[min(low + 1, len(known) - 1)] - known[low])
    return {"median": statistics.median(known), "p95": p95, "min": known[0], "max": known[-1], "count": len(known)}
