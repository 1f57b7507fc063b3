"""Logs when steps were committed, in every training process, and computes how long a kill stalled them, in the same way for all sides."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from elastic.observe.json_lines import read_lines

_RECENT_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCommit:
    """The process `pid` at `place` learned at `at` (time.monotonic()) that step `step` was committed.

    `attempt_id` changes with every change of the members. `members` is the number of members that contributed to the step.
    """

    place: int
    pid: int
    step: int
    at: float
    attempt_id: int
    members: int
    loss: float


class CommitLog:
    """Writes the commits that this process sees to its own file, which remains after the process dies."""

    def __init__(self, directory: Path | str, place: int) -> None:
        self._place, self._pid = place, os.getpid()
        path = Path(directory, f"commits-{place}-{self._pid}.jsonl")
        self._file = path.open("a", buffering=1)

    def __enter__(self) -> CommitLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, *, step: int, attempt_id: int, members: int, loss: float) -> None:
        """Logs a commit with the present time."""
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
    """Returns the commits logged so far by all processes, by time."""
    lines = (line for path in sorted(Path(directory).glob("commits-*.jsonl")) for line in read_lines(path))
    return sorted((StepCommit(**line) for line in lines), key=lambda commit: commit.at)


def first_of_each_step(commits: Iterable[StepCommit]) -> list[StepCommit]:
    """Returns, for each step of each view, the commit of the process that saw it first."""
    first: dict[tuple[int, int], StepCommit] = {}
    for commit in commits:
        first.setdefault((commit.attempt_id, commit.step), commit)
    return sorted(first.values(), key=lambda commit: commit.at)


def pace(commits: Sequence[StepCommit], at: float) -> float | None:
    """Returns seconds per step before `at`: the median of the last few steps inside one view with as many members as the newest one has."""
    seen = [commit for commit in commits if commit.at <= at]
    steps = [
        after.at - before.at
        for before, after in pairwise(seen)
        if before.attempt_id == after.attempt_id and after.members == seen[-1].members and after.step == before.step + 1
    ]
    return statistics.median(steps[-_RECENT_STEPS:]) if steps else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """The times of one stall, in seconds.

    stall: how much later than without the fault the first step after the recovery was committed. silence: the time without commits.
    lost: from the view's last commit until the fault; 0 if the step in flight was still committed. step: the duration of a step before.
    """

    stall: float
    silence: float
    lost: float
    step: float


def stall(fault: float, commits: Sequence[StepCommit]) -> Stall | None:
    """Computes the stall from `first_of_each_step`. Returns None if the pace before is unknown or no step was committed afterwards.

    A commit after the fault can still belong to the old view: it was in flight at the fault.
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
    due = max(fault, last.at + ahead * step_s) if ahead > 0 else last.at  # the last step was redone, so the next commit was due at once
    return Stall(stall=max(0.0, after.at - due), silence=after.at - last.at, lost=max(0.0, fault - last.at), step=step_s)


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Returns median, 95th and 99th percentile (linearly interpolated), minimum, maximum and count; None if there are no values."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    p95, p99 = map(float, np.quantile(known, (0.95, 0.99)))
    return {"median": statistics.median(known), "p95": p95, "p99": p99, "min": min(known), "max": max(known), "count": len(known)}
