"""Our side of the recovery benchmark: runs a job whose workers are killed, and the same job without kills."""

from __future__ import annotations

import math
import random
import re
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from commits import StepCommit, first_of_each_step, pace, read_commits, spread, stall
from measure import BenchmarkError, Task

import elastic
from elastic.chaos.fault_times import since_fault
from elastic.chaos.faults import Fault
from elastic.chaos.killer import Killer, Shot
from elastic.observe.activity import RECOVERY_PHASES
from elastic.observe.json_lines import read_lines

_HERE = Path(__file__).resolve().parent
_FIRST_KILL = 6  # the step; earlier steps are the warm-up
_PROBED = 8
_LEAST_SPACING = 6  # steps: a redone step, one more until a replacement joins, and enough to measure the pace again
_LAYOUT = re.compile(r"x(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed:
    """The result of one job. `kills` has one dict of figures per kill; names with `_ms` are milliseconds."""

    task: Task
    steps: int
    spacing: int
    kills: list[dict[str, Any]]
    missed: tuple[str, ...]
    equal: bool | None
    step_ms: float
    spares: int = 0

    def figures(self) -> dict[str, Any]:
        """Returns spreads over the kills that hit a job with all its workers; kills of a job that lacked a worker are not comparable."""
        full = [kill for kill in self.kills if kill["workers_before"] == self.task.workers]
        spreads = {name: spread(kill[name] for kill in full) for name in _SPREAD}
        counts: dict[str, int] = {}
        for kill in self.kills:
            counts[str(kill["steps_redone"])] = counts.get(str(kill["steps_redone"]), 0) + 1
        return {
            "kills": len(self.kills),
            "kills_of_a_full_job": len(full),
            "missed": self.missed,
            **spreads,
            "steps_redone": counts,
            "samples_lost": sum(kill["samples_lost"] or 0 for kill in self.kills),
            "equal_to_undisturbed": self.equal,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "side": "ours",
            "workers": self.task.workers,
            "spares": self.spares,
            "stages": self.task.stages,
            "batch": self.task.batch,
            "micro_batch": self.task.micro_batch,
            "steps": self.steps,
            "steps_between_kills": self.spacing,
            "step_ms": self.step_ms,
            **self.figures(),
            "each": self.kills,
        }


_PARTS = ("detected_ms", *(f"{phase}_ms" for phase in RECOVERY_PHASES))
_SPREAD = (
    "stall_ms",
    "lost_ms",
    *_PARTS,
    "resume_ms",
    "running_ms",
    "redo_ms",
    "slower_ms",
    "micro_batches_kept",
    "rejoined_ms",
    "replaced_ms",
    "measured_stall_ms",
    "bytes_moved",
    "bytes_minimum",
)


def kill_ours(task: Task, kills: int, gap_s: float, seed: int, *, check: bool, spares: int = 0) -> Killed:
    """Runs a job, with so many spares, and kills workers at random places at random moments, at least `gap_s` apart.

    With `check`, raises BenchmarkError if losses or parameters differ from those of the same job without kills.
    """
    step_s = _pace(task)
    spacing = max(_LEAST_SPACING, math.ceil(gap_s / step_s))
    first_kill = spacing if spares else _FIRST_KILL  # by then the spares are ready
    steps = first_kill + kills * spacing
    places = random.Random(seed)
    faults = [Fault((places.randrange(task.workers),), first_kill + number * spacing) for number in range(kills)]
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        directory = Path(name)
        with Killer(directory, faults, seed) as killer:
            result = _run(task, steps, directory, spares)
            missed = killer.close()
        commits = read_commits(directory)
        first = first_commits(directory)
    equal, fault_free_s = None, step_s
    if check:
        equal = True
        with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
            undisturbed = _run(task, steps, Path(name))
            alone = read_commits(name)
            _check_equal(_losses(commits), _losses(alone), result.value["digest"], undisturbed.value["digest"])
        fault_free_s = statistics.median(after.at - before.at for before, after in pairwise(first_of_each_step(alone)))
    return Killed(
        task=task,
        steps=steps,
        spacing=spacing,
        kills=_kills(killer.shots, result.incidents, commits, first),
        missed=tuple(map(str, missed)),
        equal=equal,
        step_ms=1000 * fault_free_s,
        spares=spares,
    )


def first_commits(directory: Path) -> dict[int, float]:
    """Returns when the first step of each epoch was committed, from the second epoch on."""
    found: dict[int, float] = {}
    for path in directory.glob("first-*.jsonl"):
        for line in read_lines(path):
            found[line["epoch"]] = min(line["at"], found.get(line["epoch"], math.inf))
    return found


def _pace(task: Task) -> float:
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        _run(task, _PROBED, Path(name))
        commits = first_of_each_step(read_commits(name))
    step_s = pace(commits, math.inf)
    if step_s is None:
        raise BenchmarkError(f"a job of {_PROBED} steps committed {len(commits)}")
    return step_s


def _run(task: Task, steps: int, directory: Path, spares: int = 0) -> elastic.JobResult:
    result = elastic.run(
        f"{_HERE / 'ours.py'}:train_logged",
        workers=task.workers,
        spares=spares,
        stages=task.stages,
        args=(task.batch, task.micro_batch, steps),
        directory=directory,
    )
    if result.stopped:
        raise KeyboardInterrupt
    return result


def _losses(commits: Sequence[StepCommit]) -> dict[int, float]:
    losses: dict[int, float] = {}
    for commit in commits:
        if losses.setdefault(commit.step, commit.loss) != commit.loss:
            raise BenchmarkError(f"workers disagree on the loss of step {commit.step}: {losses[commit.step]} and {commit.loss}")
    return losses


def _check_equal(killed: dict[int, float], alone: dict[int, float], digest: str, expected: str) -> None:
    if killed != alone:
        step = min(step for step in {*killed, *alone} if killed.get(step) != alone.get(step))
        raise BenchmarkError(f"with kills, the loss of step {step} is {killed.get(step)}, and without {alone.get(step)}")
    if digest != expected:
        raise BenchmarkError(f"the losses are equal, but the parameters have digest {digest} with kills, and {expected} without")


def _kills(
    shots: Sequence[Shot], incidents: Sequence[dict[str, Any]], commits: Sequence[StepCommit], first: dict[int, float]
) -> list[dict[str, Any]]:
    """Returns the figures of each kill. `first` maps an epoch to the time when its first step was committed."""
    steps, struck = first_of_each_step(commits), {shot.worker: shot.at for shot in shots}
    found = []
    for shot in shots:
        incident = next((i for i in incidents if i["kind"] == "death" and shot.worker in (i["worker"], *i["also"])), None)
        if incident is None:
            raise BenchmarkError(f"worker {shot.worker} was killed for {shot.fault}, but the job recorded no incident for it")
        incident = since_fault(incident, struck.get(incident["worker"], shot.at))
        join = next((i for i in incidents if i["joined"] and (i["epoch"] or 0) >= (incident["epoch"] or 0)), None)
        again = None if join is None else first.get(join["epoch"])
        redo = None if join is None else join["redo_ms"]
        measured = stall(shot.at, steps)
        phases = {f"{phase}_ms": incident["phases_ms"].get(phase) for phase in RECOVERY_PHASES}
        figures = {name: incident[name] for name in _OF_INCIDENT}
        found.append(
            {
                "asked": str(shot.fault),
                "worker": shot.worker,
                "place": shot.place,
                "observed": None if shot.observed is None else shot.observed.phase,
                "step": None if shot.observed is None else shot.observed.step,
                "workers_before": _members(incident["layout_before"]),
                "layouts": [incident["layout_before"], incident["layout_after"]],
                "attempts": incident["attempts"],
                "by_a_spare": bool(incident["spares"]),
                **figures,
                **phases,
                **_derived(incident),
                "rejoined_ms": None if again is None or redo is None else 1000 * (again - shot.at) - redo,
                "replaced_ms": None if again is None else 1000 * (again - shot.at),
                "measured_stall_ms": None if measured is None else 1000 * measured.stall,
                "step_ms": None if measured is None else 1000 * measured.step,
            }
        )
    return found


_OF_INCIDENT = (
    "stall_ms",
    "lost_ms",
    "detected_ms",
    "running_ms",
    "redo_ms",
    "steps_redone",
    "micro_batches_kept",
    "samples_lost",
    "bytes_moved",
    "bytes_minimum",
    "links_kept",
    "links_dropped",
    "links_made",
)


def _derived(incident: dict[str, Any]) -> dict[str, float | None]:
    """Returns figures that are differences of the incident's figures.

    resume_ms: from the commit of the view until the last member had switched. slower_ms: seconds to redo the lost work, minus those lost.
    """
    running, stalled, lost = (incident[name] for name in ("running_ms", "stall_ms", "lost_ms"))
    known = [incident["detected_ms"], *incident["phases_ms"].values()]
    return {
        "resume_ms": None if running is None or None in known else running - sum(known),
        "slower_ms": None if None in (running, stalled, lost) else stalled - running - lost,
    }


def _members(layout: str | None) -> int:
    """Returns the number of members of a layout such as `[0-4]x2 [5-9]x2`."""
    return sum(int(count) for count in _LAYOUT.findall(layout or ""))
