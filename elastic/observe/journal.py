"""The file `events.jsonl` of a run directory: what has happened to a job, an event a line, with the time of day.

begun {job, pid}                       the job's agent has started
view {epoch, attempt, stages, ...}     the members changed, see `elastic.observe.members.Members`
incident {incident}                    a recovery or a planned change is over: an `Incident` as JSON
said {text}                            a line that the job has printed
save {step, reason}                    a checkpoint is complete, or could not be saved for this reason
skipped {step, reason}                 a step changed nothing
ended {outcome, why}                   done, failed, killed, or this host has left (drained, rejoin)
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from elastic.observe import incident, records
from elastic.observe.incident import Incident, counted

Event = Mapping[str, Any]
_KEEPS = ("view", "incident")


class Journal:
    """Writes the events of one agent, in its thread. The file is made when something has happened that is worth keeping: a view, or a
    failure. Events that cannot be written are dropped."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._lock = threading.RLock()  # some lines are printed by other threads, and one when this cannot write
        self._unwritten: list[dict[str, Any]] = []
        self._kept = False  # whether the file is made
        self._shown = ""  # the text of the last incident: it is printed too

    def note(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Writes an event, and returns it."""
        event = {"at": round(self._clock(), 3), "kind": kind, **fields}
        with self._lock:
            self._unwritten.append(event)
        if self._kept or kind in _KEEPS:
            self.keep()
        return event

    def keep(self) -> None:
        """Writes what has happened so far."""
        with self._lock:
            events, self._unwritten, self._kept = self._unwritten, [], True
            if events:
                records.own.append(self._path, events)

    def incident(self, found: Incident) -> dict[str, Any]:
        """Writes an incident, which is not written again when its text is printed."""
        self._shown = incident.timeline(found)
        return self.note("incident", incident=found.to_json())

    def said(self, sentence: str) -> None:
        """Writes a line that the job prints."""
        if sentence != self._shown:
            self.note("said", text=sentence)


class LinesReader:
    """Reads a growing file of JSON lines repeatedly: `read` returns the new complete lines. Lines that are not JSON are left out.

    It begins at byte `place`, which is then how far it has come, and reads at most `most` bytes at a time.
    """

    def __init__(self, path: Path, place: int = 0, most: int = -1) -> None:
        self._path, self.place, self._most = path, place, most

    def read(self) -> list[dict[str, Any]]:
        data = b""
        with suppress(OSError), self._path.open("rb") as file:
            file.seek(self.place)
            data = file.read(self._most)
        end = data.rfind(b"\n") + 1
        if not end and len(data) == self._most:  # a line that is longer than what may be read
            end = len(data)
        self.place += end
        return [*_parsed(data[:end].split(b"\n"))]


def _parsed(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def shown(event: Event) -> str:
    """Formats an event for a terminal, such as `12:03:04.567  view      epoch 2: [0-5]x1 [6-9]x2, 3 workers`."""
    at = float(event.get("at", 0.0))
    clock = time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at % 1 * 1000):03d}"
    kind = str(event.get("kind", "?"))
    first, *rest = _text(kind, event).splitlines() or [""]
    return "\n".join([f"{clock}  {kind:<8}  {first}", *(" " * 24 + line for line in rest)])


def _text(kind: str, event: Event) -> str:
    if kind == "incident":
        return incident.timeline(Incident.from_json(event["incident"]))
    if kind == "view":
        return f"epoch {event['epoch']}: {event['layout']}, {counted(len(event['workers']), 'worker')}"
    if kind == "begun":
        return f"job {event['job']} begins, agent process {event['pid']}"
    if kind == "save":
        return f"step {event['step']} is saved" if event["reason"] is None else f"step {event['step']} is not saved: {event['reason']}"
    if kind == "skipped":
        return f"step {event['step']} is skipped: {event['reason']}"
    if kind == "ended":
        return f"{event['outcome']}{': ' + event['why'] if event.get('why') else ''}"
    return str(event.get("text", ""))
