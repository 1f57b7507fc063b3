"""Incidents: the record of one recovery each, from the fault to the first committed step, with its figures; stored as JSON lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic.errors import SettingsError
from elastic.observe.activity import RECOVERY_PHASES
from elastic.observe.finding import Finding
from elastic.observe.gpu_health import GpuHealth
from elastic.observe.json_lines import read_lines

KINDS = ("death", "eviction", "damage", "drain", "join", "rebalance")
INITIAL_STATE = "initial state"
"""The value of `Incident.restored` if training began again at step 0."""

_TUPLES = ("also", "joined", "spares")

_HAPPENED = {
    "death": "died",
    "eviction": "was evicted",
    "damage": "discarded damaged state",
    "drain": "left",
    "join": "joined",
    "rebalance": "work was shifted",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """One recovery. Unknown values are None; times are in milliseconds. Raises SettingsError if `kind` is none of KINDS.

    kind: the kind of fault; it hit worker `worker` at place `place`, in phase `phase` of step `step`. why: a reason in words, if any; of
    workers that died with their host, which host that was and how its loss was noticed.
    cause: of an eviction, what the evidence showed: one of the kinds of `elastic.health.verdict`, such as `stopped` or `spinning`.
    also: further workers that were lost in the same recovery. joined: workers that are in the new view and not in the old one; `spares` of
    them had been waiting.
    epoch: of the resulting view. attempts: how many attempts it took.
    at: the monotonic time of the fault, when the first process missed the worker. detected_ms: from then until the agent noticed.
    phases_ms: how long each of RECOVERY_PHASES took, in the last attempt.
    lost_ms: from the beginning of the oldest step that had to be redone until the fault: the discarded work, except for
    micro_batches_kept, which the survivors had finished and need not compute again.
    running_ms: from the fault until every member had switched to the new view. redo_ms: from then until its first step was committed.
    redo_taken_over_ms: how long layers computed, in that time, what lost workers were to compute of the step, on the worker with most
    of it; the rest of redo_ms is the workers' own rest of the step, and waiting. None if no step was redone.
    stall_ms: how much later that step was committed than without the fault.
    restored: the checkpoint that all members loaded, if some of the state was in no worker's memory any more; or INITIAL_STATE.
    planned: the predicted cost of the plan, and of the alternative that leaves the layers in place.
    findings: what was wrong in memory: where, by which digests, and since when. went_back_to: the step after which all workers took steps
    again that loops had been given, since copies of the state differed.
    gpus: what the GPUs of the lost workers have counted, as far as it was read by the end of the incident.
    samples_lost: samples that no committed step has used. bytes_moved: as counted; of these,
    bytes_copied were copied from segments of the same host, without a link. bytes_minimum: the least that an oracle computes.
    """

    kind: str
    at: float | None = None
    worker: int | None = None
    place: int | None = None
    step: int | None = None
    phase: str | None = None
    also: tuple[int, ...] = ()
    epoch: int | None = None
    attempts: int | None = None
    detected_ms: float | None = None
    phases_ms: Mapping[str, float] = field(default_factory=dict)
    lost_ms: float | None = None
    running_ms: float | None = None
    redo_ms: float | None = None
    redo_taken_over_ms: float | None = None
    stall_ms: float | None = None
    steps_redone: int | None = None
    restored: str | None = None
    micro_batches_kept: int | None = None
    samples_lost: int | None = None
    bytes_moved: int | None = None
    bytes_copied: int | None = None
    bytes_minimum: int | None = None
    links_kept: int | None = None
    links_dropped: int | None = None
    links_made: int | None = None
    joined: tuple[int, ...] = ()
    spares: tuple[int, ...] = ()
    layout_before: str | None = None
    layout_after: str | None = None
    why: str | None = None
    cause: str | None = None
    planned: str | None = None
    findings: tuple[Finding, ...] = ()
    went_back_to: int | None = None
    gpus: tuple[GpuHealth, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingsError(f"kind={self.kind!r}: an incident is one of {', '.join(KINDS)}")
        if unknown := sorted(set(self.phases_ms).difference(RECOVERY_PHASES)):
            raise SettingsError(f"phases_ms has {', '.join(unknown)}: use {', '.join(RECOVERY_PHASES)}")

    def to_json(self) -> dict[str, Any]:
        """Returns JSON types only; `from_json` returns an equal incident."""
        data = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        findings = [each.to_json() for each in self.findings]
        lists = {name: list(data[name]) for name in _TUPLES}
        gpus = [each.to_json() for each in self.gpus]
        return {**data, **lists, "phases_ms": dict(self.phases_ms), "findings": findings, "gpus": gpus}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Incident:
        """The inverse of `to_json`."""
        known = dict(data)
        findings = tuple(map(Finding.from_json, known.get("findings", ())))
        gpus = tuple(map(GpuHealth.from_json, known.get("gpus", ())))
        return cls(**{**known, **{name: tuple(known[name]) for name in _TUPLES}, "findings": findings, "gpus": gpus})


def read(path: Path | str) -> list[Incident]:
    """Returns the incidents in a file, none if there is no file. Raises SettingsError if it is no file of incidents."""
    try:
        return [Incident.from_json(line) for line in read_lines(path)]
    except (TypeError, KeyError) as error:
        raise SettingsError(f"{path} is not a file of incidents: {error}") from error


def timeline(incident: Incident) -> str:
    """Formats the incident in a few lines for a terminal; times count from the fault. Unknown values are left out, such as:

    worker 1 (place 1) died in step 8, backward
      +0.9 ms detected | quiesce 3.1 | propose 4.0 | migrate 12.5 | gate 0.8 | commit 2.2
      [0-4]x2 [5-9]x2 -> [0-3]x1 [4-9]x2, 8.6 MB moved (the minimum), 3 links kept, 1 dropped, 1 made
      planned: 2 stages, every stage keeps its layers: 0.41 s computing and 0.01 s exchanging gradients, predicted; ...
      running again after 61 ms; lost 0.2 s of step 8, no sample lost, stalled 243 ms
    """
    planned = f"planned: {incident.planned}" if incident.planned else ""
    gpus = [str(each) for each in incident.gpus if each.notable]
    lines = [_headline(incident), *gpus, _phases(incident), _changes(incident), planned, _outcome(incident)]
    return "\n  ".join(line for line in lines if line)


def headline(incident: Mapping[str, Any]) -> str:
    """Returns the first line of an incident's timeline, with its stall; the incident is given as JSON."""
    found = Incident.from_json(incident)
    stall = "" if found.stall_ms is None else f", stalled {found.stall_ms:.0f} ms"
    return f"{_headline(found)}{stall}"


def _headline(incident: Incident) -> str:
    subjects = _subjects(incident)
    happened = _HAPPENED[incident.kind]
    if len(subjects) > 1 and incident.kind == "eviction":
        happened = "were evicted"
    nobody = incident.kind == "rebalance"
    if incident.kind == "damage" and not subjects:
        happened, nobody = "copies of the state differed", True
    text = happened if nobody else f"{_named(incident, subjects)}{_place(incident)} {happened}"
    if incident.step is not None:
        text += f" {'in' if incident.kind in ('death', 'eviction', 'damage') else 'at'} step {incident.step}"
        text += f", {incident.phase}" if incident.phase else ""
    if incident.kind != "join" and incident.joined:
        text += f"; {_named(incident, incident.joined)} joined"
    why = f"{incident.cause}: {incident.why}" if incident.cause and incident.why else incident.why
    return f"{text}: {why}" if why else text


def _subjects(incident: Incident) -> tuple[int, ...]:
    first = () if incident.worker is None else (incident.worker,)
    return tuple(dict.fromkeys((*first, *incident.also, *(incident.joined if incident.kind == "join" else ()))))


def _named(incident: Incident, workers: Sequence[int]) -> str:
    """Formats workers, such as `worker 4` or `spare worker 4`."""
    spares = [worker for worker in workers if worker in incident.spares]
    others = [worker for worker in workers if worker not in incident.spares]
    groups = [_people(others)] if others or not spares else []
    return " and ".join([*groups, *([f"spare {_people(spares)}"] if spares else [])])


def _people(workers: Sequence[int]) -> str:
    """Formats workers such as `worker 4`, `workers 4 and 5`, `workers 4, 5 and 6`."""
    if not workers:
        return "a worker"
    *others, last = map(str, workers)
    return f"workers {', '.join(others)} and {last}" if others else f"worker {last}"


def _place(incident: Incident) -> str:
    """Formats the place of the worker, if there is only one."""
    alone = len(_subjects(incident)) == 1 and incident.worker is not None
    return f" (place {incident.place})" if alone and incident.place is not None and incident.kind != "join" else ""


def _phases(incident: Incident) -> str:
    parts = [] if incident.detected_ms is None else [f"+{incident.detected_ms:.1f} ms detected"]
    parts += [f"{phase} {incident.phases_ms[phase]:.1f}" for phase in RECOVERY_PHASES if phase in incident.phases_ms]
    if parts and incident.detected_ms is None:
        parts[0] += " ms"
    if incident.attempts is not None and incident.attempts > 1:
        parts.append(f"{incident.attempts} attempts")
    return " | ".join(parts)


def _changes(incident: Incident) -> str:
    parts = []
    if incident.layout_after is not None:
        parts.append(f"{incident.layout_before or ''} -> {incident.layout_after}".strip())
    if incident.went_back_to is not None:
        parts.append(f"went back to the state after step {incident.went_back_to}")
    if incident.restored == INITIAL_STATE:
        parts.append("restarted at step 0, from the seed")
    elif incident.restored is not None:
        parts.append(f"reloaded the checkpoint {incident.restored}")
    elif incident.bytes_moved is not None:
        copied = f", {_size(incident.bytes_copied)} of it from segments" if incident.bytes_copied else ""
        parts.append(f"{_size(incident.bytes_moved)} moved{_against_minimum(incident)}{copied}")
    links = [
        (incident.links_kept, "kept"),
        (incident.links_dropped, "dropped"),
        (incident.links_made, "made"),
    ]
    known = [(count, what) for count, what in links if count is not None]
    for index, (count, what) in enumerate(known):
        noun = "" if index else " link" if count == 1 else " links"
        parts.append(f"{count}{noun} {what}")
    return ", ".join(parts)


def _against_minimum(incident: Incident) -> str:
    moved, minimum = incident.bytes_moved, incident.bytes_minimum
    if minimum is None:
        return ""
    return " (the minimum)" if moved == minimum else f" (the minimum is {_size(minimum)})"


def _outcome(incident: Incident) -> str:
    parts = []
    if incident.lost_ms is not None:
        parts.append(f"lost {_seconds(incident.lost_ms)} of {_redone(incident)}" if incident.steps_redone != 0 else "no step redone")
    elif incident.steps_redone is not None:
        parts.append(f"{counted(incident.steps_redone, 'step')} redone")
    if incident.micro_batches_kept:
        parts.append(f"{incident.micro_batches_kept} of its micro-batches kept")
    if incident.samples_lost is not None:
        parts.append(f"{counted(incident.samples_lost, 'sample')} lost")
    if incident.redo_taken_over_ms:
        parts.append(f"{_seconds(incident.redo_taken_over_ms)} for what others were to compute")
    if incident.stall_ms is not None:
        parts.append(f"stalled {incident.stall_ms:.0f} ms")
    text = ", ".join(parts)
    if incident.running_ms is None:
        return text
    return f"running again after {incident.running_ms:.0f} ms" + (f"; {text}" if text else "")


def _redone(incident: Incident) -> str:
    """Formats the steps whose work was discarded: the one in flight, and those before it."""
    count = incident.steps_redone
    if count is not None and count > 1:
        return f"steps {max(0, incident.step - count + 1)} to {incident.step}" if incident.step is not None else f"{count} steps"
    return "a step" if incident.step is None else f"step {incident.step}"


def counted(number: int, noun: str) -> str:
    """Formats a number of things; `noun` names one."""
    return f"{number or 'no'} {noun}{'' if number in (0, 1) else 's'}"


def _seconds(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.1f} s" if milliseconds >= 100 else f"{milliseconds:.0f} ms"


def _size(count: int) -> str:
    """Formats a byte count in decimal units, like link speeds."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return counted(count, "byte") if count else "nothing"
