"""The report of a run as JSON. `docs/chaos.md` documents its fields; `load` reads the schedule back, for `replay` and `shrink`."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elastic.chaos import figures
from elastic.chaos.oracles.ending import usual_s
from elastic.chaos.schedule import Schedule
from elastic.chaos.trial import Record
from elastic.errors import SettingsError
from elastic.settings import VERSION, best_isa

FORM = 1


def report(record: Record, shrunk: Schedule | None = None) -> dict[str, Any]:
    """Returns the report, JSON types only. `shrunk` is the smallest schedule that fails, if it was looked for."""
    evidence = record.evidence
    goodput = figures.goodput(evidence)
    seconds = evidence.ended - evidence.began
    steps = evidence.steps
    return {
        "form": FORM,
        "version": VERSION,
        "machine": {"processors": evidence.processors, "isa": best_isa(), "system": platform.platform()},
        "verdict": record.verdict,
        "reasons": record.reasons,
        "findings": [asdict(finding) for finding in record.findings],
        "schedule": evidence.schedule.to_json(),
        "shrunk": None if shrunk is None else shrunk.to_json(),
        "notices": list(evidence.notices),
        "exact": all(notes.exact for notes in evidence.workers),
        "faults": [effect.to_json(evidence.began) for effect in evidence.effects],
        "steps": len(steps),
        "step_s": usual_s(evidence) if len(steps) > 1 else None,
        "seconds": seconds,
        "goodput": None
        if goodput is None
        else {**asdict(goodput), "rates": {str(k): v for k, v in goodput.rates.items()}, "share": goodput.share},
        "harness": {
            "cpu_s": record.harness_cpu_s,
            "share": record.harness_cpu_s / (seconds * evidence.processors) if seconds > 0 else None,
        },
        "stalls": figures.stalls(evidence),
        "speed": figures.speed(evidence),
        "views": [
            {"at": at - evidence.began, "host": host, "epoch": epoch, "workers": list(workers)}
            for at, host, epoch, workers in evidence.seen.views
        ],
        "layouts": _layouts(record),
        "incidents": [{**each, "at": None if each["at"] is None else each["at"] - evidence.began} for each in evidence.incidents],
        "runs": len(evidence.runs),
        "hosts": [{"number": host.number, "codes": list(host.codes), "log": host.log[-6000:]} for host in evidence.hosts],
        "digest": next((value for notes in evidence.workers for value in list(notes.digests.values())[-1:] if notes.returned), None),
    }


def _layouts(record: Record) -> list[dict[str, Any]]:
    """Each epoch's layout, from when on its first step was given."""
    evidence, found = record.evidence, dict[tuple[str, int], dict[str, Any]]()
    for run in evidence.runs:
        for given in sorted((each for notes in run for each in notes.given), key=lambda each: each.at):
            key = (run[0].run, given.epoch)
            at = given.at - evidence.began
            found.setdefault(key, {"epoch": given.epoch, "at": at, "step": given.step, "layout": given.layout, "workers": given.workers})
    return list(found.values())


def write(path: Path, data: dict[str, Any]) -> None:
    """Writes a report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def load(path: Path) -> tuple[Schedule, dict[str, Any]]:
    """Reads a report; returns its schedule, and all of it. Raises SettingsError, which names the file."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"the report {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{path} is no report of `elastic chaos run --json`: {error}") from error
    if not isinstance(data, dict) or data.get("form") != FORM or not isinstance(data.get("schedule"), dict):
        raise SettingsError(f"{path} is no report of `elastic chaos run --json`, or of another version")
    try:
        return Schedule.from_json(data["schedule"]), data
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
