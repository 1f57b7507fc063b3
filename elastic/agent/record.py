"""What one agent records of its job for those who look at it: events, steps, and how the job stands; in files, and for the launcher.

    agent -> launcher   seen {what: "steps", rows} | seen {what: "incident" | "view" | "live" | "event", ...}

The launcher gets this only if it has asked for it. It never delays the job: what it does not read is dropped, which is reported once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from elastic.agent.start import Start
from elastic.host.channel import Channel, Message
from elastic.host.rundir import RunDirectory
from elastic.observe.incident import Incident
from elastic.observe.journal import Journal
from elastic.observe.members import Members
from elastic.observe.step_log import Step, StepLog
from elastic.view import View

_OVERLAP_S = 1.0  # steps of this time may not have reached the agent that is lost, and clocks of hosts may differ
_UNREAD = 4 << 20  # bytes that wait for the launcher; what is more is dropped


class JobRecord:
    """The record of the job on this host, from the agent's start to its end. `memory` has the last reported bytes of each worker."""

    def __init__(self, start: Start, directory: RunDirectory, launcher: Channel) -> None:
        self.directory = directory
        self._launcher, self._wanted = launcher, start.watches
        self.journal = Journal(directory.events)
        self.steps = StepLog(directory.steps)
        self.progress: dict[int, Message] = {}  # the last report of each worker
        self.links: dict[tuple[int, int], tuple[float | None, float | None]] = {}  # latency in s, bytes/s of each pair of workers
        self._saves, self._skips = set[int](), set[int]()
        self._dropped = 0
        self._since = 0.0  # the time of day from which on steps are told to the launcher
        self.journal.note("begun", job=start.settings.name, pid=os.getpid())

    def heard(self, worker: int, message: Message) -> None:
        """Notes what a worker's message says; other messages are ignored."""
        kind = message["type"]
        if kind == "progress":
            self.progress[worker] = {**self.progress.get(worker, {}), **message}  # some reports are shorter
            for peer, *speeds in message.get("links", ()):
                latency_s, bytes_per_s = speeds
                self.links[min(worker, peer), max(worker, peer)] = latency_s, bytes_per_s
        elif kind == "steps":
            self._stepped(message["rows"])
        elif kind == "save" and (message["reason"] is not None or message["step"] not in self._saves):
            self._saves.add(message["step"])
            self._event("save", step=message["step"], reason=message["reason"])
        elif kind == "skipped" and message["step"] not in self._skips:
            self._skips.add(message["step"])
            self._event("skipped", step=message["step"], reason=message["reason"])

    def _stepped(self, rows: Sequence[Sequence[Any]]) -> None:
        memory = [each["memory"] for each in self.progress.values() if "memory" in each]
        more = {"memory": max(memory), "memory_sum": sum(memory)} if memory else {}
        new = [step for step in self.steps.new(map(Step.from_row, rows), **more) if step.at >= self._since]
        if new:
            self.tell("steps", rows=[step.to_row() for step in new])

    def take_over(self, since: float) -> None:
        """Notes that another agent has coordinated the job until then (time.monotonic()): its launcher was told of earlier steps."""
        self._since = time.time() - time.monotonic() + since - _OVERLAP_S

    def view(self, view: View) -> None:
        """Notes a committed view."""
        members = Members.of(view)
        self.progress = {worker: told for worker, told in self.progress.items() if worker in members.workers}
        self.links = {pair: speeds for pair, speeds in self.links.items() if {*pair} <= {*members.workers}}
        self.tell("view", **self.journal.note("view", **members.to_json()))

    def incident(self, found: Incident) -> None:
        """Notes a recorded incident."""
        self.tell("incident", **self.journal.incident(found))

    def said(self, sentence: str) -> None:
        """Notes a line that the job prints."""
        self.journal.said(sentence)

    def _event(self, kind: str, **fields: Any) -> None:
        self.tell("event", **self.journal.note(kind, **fields))

    def live(self, found: Message) -> None:
        """Writes how the job stands now."""
        self.directory.write_live(found)
        self.tell("live", live=found)

    def tell(self, what: str, **fields: Any) -> None:
        """Sends to the launcher, if it has asked for it and reads."""
        if not self._wanted:
            return
        if self._launcher.waiting > _UNREAD:
            self._dropped += 1
            return
        self._launcher.send({"type": "seen", "what": what, "dropped": self._dropped, **fields})

    def close(self, outcome: Message | None) -> None:
        """Notes how the job has ended here."""
        kind = "killed" if outcome is None else outcome["type"]
        why = "" if outcome is None else str(outcome.get("message", outcome.get("why", "")))
        if kind == "failed":
            self.journal.keep()
        self.tell("event", **self.journal.note("ended", outcome=kind, why=why.strip().splitlines()[-1] if why.strip() else ""))
