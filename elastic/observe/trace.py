"""The trace of a job as JSON for Perfetto and chrome://tracing: what each worker did in each step, whom it waited for, and incidents.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU describes the format. Times are in microseconds since the
first record. A worker is a process, with the tracks `steps`, `phases`, `waits` and `changes`; incidents are one more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from elastic.host.rundir import RunDirectory
from elastic.observe import activity, incident
from elastic.observe.activity import PHASES, RECOVERY_PHASES, STEP_PHASES
from elastic.observe.incident import Incident
from elastic.observe.journal import LinesReader
from elastic.observe.trace_file import ENDS_WAITING, MOST, RECORD, WAITS, records

Event = dict[str, Any]
INCIDENTS = 1_000_000
"""The process number of incidents."""

_TRACKS = ("steps", "phases", "waits", "changes")


def write(directory: RunDirectory, path: Path) -> None:
    """Writes the trace of the job in a run directory. Raises OSError."""
    found = sorted(events(directory), key=lambda event: event.get("ts", -1.0))
    first = min((event["ts"] for event in found if "ts" in event), default=0.0)
    with path.open("w") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for number, event in enumerate(found):
            if "ts" in event:
                event["ts"] = round(event["ts"] - first, 3)
            file.write((",\n" if number else "") + json.dumps(event))
        file.write("\n]}\n")


def events(directory: RunDirectory) -> Iterator[Event]:
    """Yields the events in no particular order."""
    for path in sorted(directory.trace.glob("*")) if directory.trace.is_dir() else ():
        if path.name.isdigit():
            yield from worker_events(int(path.name), path)
    yield from _incidents(LinesReader(directory.incidents).read())


def worker_events(worker: int, path: Path) -> Iterator[Event]:
    """Yields the events of one worker."""
    yield _name("process_name", worker, 0, f"worker {worker}")
    yield {"ph": "M", "name": "process_sort_index", "pid": worker, "tid": 0, "args": {"sort_index": worker}}
    for number, track in enumerate(_TRACKS):
        yield _name("thread_name", worker, number, track)
    found = [*records(path)]
    yield from _phases(worker, found)
    yield from _steps(worker, found)
    yield from _waits(worker, found)
    for mark in LinesReader(path.with_suffix(".jsonl")).read():
        more = {name: value for name, value in mark.items() if name not in ("name", "begin", "end")}
        yield _span(worker, 3, mark["name"], "transfer", mark["begin"], mark["end"], more)
    if len(found) * RECORD.size >= MOST:
        yield {"ph": "i", "s": "p", "name": "the trace is full", "ts": found[-1][0] * 1e6, "pid": worker, "tid": 1}


def _phases(worker: int, found: list[tuple[float, int, int, int, int]]) -> Iterator[Event]:
    """Phases last until the next one begins. A micro-batch's second backward is the part for the weights of a split one."""
    phases = [each for each in found if each[1] < WAITS]
    split = _split(phases)
    for place, (at, code, epoch, step, micro_batch) in enumerate(phases[:-1]):
        phase = PHASES[code]
        if phase == "idle":
            continue
        name = phase if micro_batch < 0 else f"{split.get(place, phase)} {micro_batch}"
        args = {"step": step, "epoch": epoch} | ({} if micro_batch < 0 else {"micro_batch": micro_batch})
        yield _span(worker, 1, name, phase, at, phases[place + 1][0], args)


def _split(phases: list[tuple[float, int, int, int, int]]) -> dict[int, str]:
    """Returns the names of the parts of split backwards, by their places."""
    found: dict[int, str] = {}
    last: dict[int, tuple[int, int]] = {}  # the step and place of each micro-batch's last backward
    for place, (_, code, _, step, micro_batch) in enumerate(phases):
        if PHASES[code] == "forward":
            last.pop(micro_batch, None)
        elif PHASES[code] == "backward":
            before = last.get(micro_batch)
            if before is not None and before[0] == step:
                found[before[1]], found[place] = "backward, input", "backward, weights"
            last[micro_batch] = step, place
    return found


def _steps(worker: int, found: list[tuple[float, int, int, int, int]]) -> Iterator[Event]:
    begun: tuple[float, int, int] | None = None
    for at, code, epoch, step, _ in found:
        if code >= WAITS:
            continue
        now = (epoch, step) if PHASES[code] in STEP_PHASES else None
        if begun is not None and now != (begun[1], begun[2]):
            yield _span(worker, 0, f"step {begun[2]}", "step", begun[0], at, {"epoch": begun[1]})
            begun = None
        if begun is None and now is not None:
            begun = at, epoch, step


def _waits(worker: int, found: list[tuple[float, int, int, int, int]]) -> Iterator[Event]:
    begun: tuple[float, int] | None = None
    for at, code, _, _, peer in found:
        if code == WAITS:
            begun = begun or (at, peer)
        elif code == ENDS_WAITING and begun is not None:
            whom = "the agent" if begun[1] == activity.AGENT else f"worker {begun[1]}"
            yield _span(worker, 2, f"waits for {whom}", "wait", begun[0], at, {})
            begun = None


def _incidents(found: Iterable[Mapping[str, Any]]) -> Iterator[Event]:
    yield _name("process_name", INCIDENTS, 0, "incidents")
    for line in found:
        each = Incident.from_json(line)
        if each.at is None:
            continue
        begin = each.at + (each.detected_ms or 0.0) / 1000
        text = incident.timeline(each)
        end = each.at + (each.running_ms or 0.0) / 1000
        parts = [(phase, each.phases_ms[phase] / 1000) for phase in RECOVERY_PHASES if phase in each.phases_ms]
        end = max(end, begin + sum(seconds for _, seconds in parts))
        yield _span(INCIDENTS, 0, f"{each.kind}, step {each.step}", "incident", each.at, end, {"text": text})
        for phase, seconds in parts:
            yield _span(INCIDENTS, 0, phase, "recovery", begin, begin + seconds, {})
            begin += seconds


def _span(process: int, track: int, name: str, kind: str, begin: float, end: float, args: Mapping[str, Any]) -> Event:
    times = {"ts": begin * 1e6, "dur": round(max(0.0, end - begin) * 1e6, 3)}
    return {"ph": "X", "name": name, "cat": kind, **times, "pid": process, "tid": track, "args": dict(args)}


def _name(what: str, process: int, track: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": process, "tid": track, "args": {"name": name}}
