"""Kills workers of a running job as planned, and records in faults.jsonl what each kill hit.

The line of a kill is complete before the signal is sent, since the agent reads it when it handles the death. What the victim was really
doing is known only after its death, from the phase that it entered last: a second line reports it as `observed`.
"""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.chaos.faults import Fault, in_order
from elastic.chaos.roster import Roster, RosterFile, Victim
from elastic.chaos.trigger import FAR_S, Trigger
from elastic.observe.activity import Doing
from elastic.observe.json_lines import append_lines

_DEATH_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """One worker that was killed for `fault`; `at` is the time.monotonic() of the kill. `seen` is its activity just before.

    `observed` is the activity that it entered last, read after its death; None until it is dead.
    """

    fault: Fault
    worker: int
    pid: int
    place: int
    epoch: int
    at: float
    seen: Doing
    observed: Doing | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns a line for faults.jsonl: the kill, or, once `observed` is set, the observation."""
        line = {"at": self.at, "worker": self.worker, "pid": self.pid, "place": self.place, "asked": str(self.fault)}
        if self.observed is None:
            return {**line, "step": self.seen.step, "phase": self.seen.phase, "kind": "kill"}
        return {**line, "step": self.observed.step, "observed": self.observed.phase, "kind": "observed"}


@dataclass(frozen=True, slots=True)
class Missed:
    """A fault that never fired, and why."""

    fault: Fault
    why: str

    def __str__(self) -> str:
        return f"{self.fault} did not fire: {self.why}"


class Killer:
    """Injects faults into the job of this run directory, in its own thread, ordered by step; those of one step in the order given.

    Each fault hits members of the newest view. A fault in a step waits for a view newer than the one that the previous fault hit. If a
    phase was too short to be seen, the next phase that is seen is hit. A fault without a phase hits a random moment of its step, drawn from
    `seed`. Only workers of this host can be hit. A Killer may be started before the job, even before the directory exists.
    """

    def __init__(self, directory: Path | str, faults: Iterable[Fault], seed: int = 0) -> None:
        self._directory = Path(directory)
        self._faults = in_order(faults)
        self._why = dict.fromkeys(range(len(self._faults)), "it was not its turn")
        self._random = random.Random(seed)
        self._rosters = RosterFile(self._directory / "members.json")
        self._roster: Roster | None = None
        self._targets: dict[int, Victim] = {}
        self._reached = -1
        self._shots: list[Shot] = []
        self._dying: list[tuple[int, Victim]] = []  # places in _shots
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elastic-killer", daemon=True)
        self._thread.start()

    def __enter__(self) -> Killer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> tuple[Missed, ...]:
        """Stops injecting. Returns the faults that did not fire."""
        self._closing.set()
        self._thread.join()
        return self.missed

    @property
    def missed(self) -> tuple[Missed, ...]:
        """The faults that have not fired so far."""
        return tuple(Missed(self._faults[index], why) for index, why in sorted(self._why.copy().items()))

    @property
    def shots(self) -> tuple[Shot, ...]:
        """The workers that were killed, in order of the kills."""
        return tuple(self._shots)

    def _run(self) -> None:
        try:
            for index, fault in enumerate(self._faults):
                self._inject(index, fault)
            while self._dying and not self._closing.is_set():
                self._pause(FAR_S)
            self._bury(_DEATH_S)
        finally:
            for target in [*self._targets.values(), *(target for _, target in self._dying)]:
                target.close()

    def _inject(self, index: int, fault: Fault) -> None:
        """Waits until the fault is due and injects it. Returns without injecting it if it can no longer fire, or after `close`."""
        trigger = self._trigger(fault)
        while not self._closing.is_set():
            roster = self._renew()
            if roster is None:
                self._why[index] = "no view was committed"
            elif absent := [place for place in fault.places if place >= len(roster.members)]:
                count = len(roster.members)
                self._why[index] = f"there is no place {absent[0]} in a view of {count} worker{'s' * (count > 1)}"
                if any(trigger.passed(doing, roster.epoch) for doing in self._look_around()):
                    return
            else:
                victims = [(place, self._targets[roster.members[place][0]]) for place in fault.places]
                aim = _Aim.at(victims)
                self._why[index] = aim.where
                if aim.seen and trigger.due(aim.seen[0], roster.epoch, time.monotonic(), victims[0][1].pace.step_s):
                    self._strike(index, victims, aim.seen, roster.epoch)
                    self._reached = trigger.reached
                    return
            self._reached = trigger.reached
            self._pause(trigger.pause_s)

    def _trigger(self, fault: Fault) -> Trigger:
        last = self._shots[-1] if self._shots else None
        return Trigger(
            fault=fault,
            fraction=self._random.random(),
            struck=None if last is None else last.epoch,
            mid_recovery=last is not None and last.fault.in_recovery,
            reached=self._reached,
        )

    def _renew(self) -> Roster | None:
        """Returns the newest view and makes its members the targets. Opens their pidfds at once, while the pids are surely theirs."""
        roster = self._rosters.read()
        if roster is not None and roster != self._roster:
            self._roster = roster
            old, self._targets = self._targets, {}
            for worker, pid in roster.members:
                self._targets[worker] = old.pop(worker, None) or Victim(self._directory, worker, pid, roster.forkserver)
            for target in old.values():
                if all(target is not dying for _, dying in self._dying):
                    target.close()
        return roster

    def _look_around(self) -> list[Doing]:
        return [doing for target in self._targets.values() if (doing := target.look()) is not None]

    def _strike(self, index: int, victims: Sequence[tuple[int, Victim]], seen: Sequence[Doing], epoch: int) -> None:
        at, fault = time.monotonic(), self._faults[index]
        shots = [
            Shot(fault=fault, worker=target.worker, pid=target.pid, place=place, epoch=epoch, at=at, seen=doing)
            for (place, target), doing in zip(victims, seen, strict=True)
        ]
        try:
            append_lines(self._directory / "faults.jsonl", [shot.to_json() for shot in shots])
        except FileNotFoundError:
            self._why[index] = "the job was over"
            return
        for _, target in victims:
            target.kill()
        del self._why[index]
        self._dying += [(number, target) for number, (_, target) in enumerate(victims, len(self._shots))]
        self._shots += shots

    def _pause(self, seconds: float) -> None:
        self._bury(0.0)
        self._closing.wait(seconds)

    def _bury(self, patience_s: float) -> None:
        """Records the last activity of each victim that is dead or dies within `patience_s` seconds."""
        left = []
        for number, target in self._dying:
            doing = target.look() if target.ended(patience_s) else None
            if doing is None:
                left.append((number, target))
                continue
            self._shots[number] = shot = dataclasses.replace(self._shots[number], observed=doing)
            with suppress(FileNotFoundError):  # the job was over at once
                append_lines(self._directory / "faults.jsonl", [shot.to_json()])
            if self._targets.get(target.worker) is not target:
                target.close()
        self._dying = left


@dataclass(frozen=True, slots=True)
class _Aim:
    """The activity of all victims of a fault (empty if one of them cannot be hit), and a sentence about where they are."""

    seen: tuple[Doing, ...]
    where: str

    @classmethod
    def at(cls, victims: Sequence[tuple[int, Victim]]) -> _Aim:
        seen = []
        for place, target in victims:
            who = f"worker {target.worker} at place {place}"
            doing = target.look()
            if target.ended():
                return cls((), f"{who} had ended" + ("" if doing is None else f" in step {doing.step}, {doing.phase}"))
            if doing is None:
                return cls((), f"{who} had not started")
            seen.append(doing)
        place, target = victims[0]
        return cls(tuple(seen), f"worker {target.worker} at place {place} was last seen in step {seen[0].step}, {seen[0].phase}")
