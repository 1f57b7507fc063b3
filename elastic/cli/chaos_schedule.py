"""The schedule that the options of `elastic chaos run` ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elastic.chaos import injection
from elastic.chaos import scenario as scenarios
from elastic.chaos.random_schedule import drawn
from elastic.chaos.schedule import JobSpec, Schedule
from elastic.errors import SettingsError
from elastic.script.target import name_of


def schedule_of(
    scenario: Path | None, job: dict[str, Any], seed: int, mtbf: float, faults: str | None, fault: list[str] | None
) -> Schedule:
    """Returns a scenario's schedule, one of given faults, or a random one; `job` has the fields of the job that were given.

    Raises SettingsError.
    """
    if "script" in job:
        job["script"] = name_of(job["script"])
    if scenario is not None:
        if faults or fault:
            raise SettingsError("a scenario has its own faults: leave --faults and --fault out, or the scenario")
        known = scenarios.load(scenario)
        made = {**known.job.to_json(), **job}
        return Schedule.from_json({**known.to_json(), "job": {**made, "script": name_of(made["script"])}})
    spec = JobSpec.from_json({"checkpoint_every": 20, "minutes": 1.0, **job})
    if fault:
        if faults:
            raise SettingsError("give either --faults (kinds of random faults) or --fault (a fault)")
        return Schedule(job=spec, injections=tuple(map(injection.parse, fault)), seed=seed)
    kinds = None if faults is None else [name.strip() for name in faults.split(",") if name.strip()]
    if kinds == []:
        raise SettingsError("--faults names no kind: leave it out for all that fit, or see `elastic chaos list`")
    return drawn(spec, seed, mtbf, kinds)
