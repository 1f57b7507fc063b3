"""Scenarios: schedules that people write down as TOML.

[job]
hosts = 1
workers = 4
steps = 60

[[fault]]
kind = "kill"
step = 12
phase = "backward"
place = 1

[[fault]]
kind = "stop"
time = 3.5
seconds = 4
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from elastic.chaos.schedule import JobSpec, Schedule
from elastic.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


def load(path: Path) -> Schedule:
    """Reads a scenario. Raises SettingsError, which names the file."""
    try:
        return parsed(path.read_text())
    except OSError as error:
        raise SettingsError(f"the scenario {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: it is not TOML: {error}") from error
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def parsed(text: str) -> Schedule:
    """Parses the TOML form. Raises SettingsError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"it is not TOML: {error}") from error
    faults = data.pop("fault", [])
    if not isinstance(faults, list) or not isinstance(data.get("job", {}), dict):
        raise SettingsError("use one table [job] and a table [[fault]] for each fault")
    return Schedule.from_json({**data, "faults": faults})


def written(schedule: Schedule) -> str:
    """The TOML form, the inverse of `parsed`."""
    defaults = JobSpec().to_json()
    job = {name: value for name, value in schedule.job.to_json().items() if value != defaults[name]}
    tables = [("[job]", job), *(("[[fault]]", each.to_json()) for each in schedule.injections)]
    parts = ["\n".join([name_of_table, *(f"{name} = {_value(value)}" for name, value in table.items())]) for name_of_table, table in tables]
    heading = f"seed = {schedule.seed}" + ("\ndrawn = true" if schedule.drawn else "")
    return "\n\n".join([heading, *parts]) + "\n"


def _value(value: Any) -> str:
    """JSON's numbers, strings and lists are TOML's too; objects are not."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {_value(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)
