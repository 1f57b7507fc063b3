"""The report as one HTML page, from its JSON: no file or network is needed to look at it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment

from elastic.chaos import drawing
from elastic.chaos.scenario import written
from elastic.chaos.schedule import Schedule
from elastic.observe.page import STYLE

_FILES = Path(__file__).parent / "page"


def page(report: Mapping[str, Any], path: str | None = None) -> str:
    """Returns the page of a report; `path` is that of its JSON file, for the command that repeats the run."""
    environment = Environment(autoescape=True, trim_blocks=True)
    schedule, job = Schedule.from_json(report["schedule"]), report["schedule"]["job"]
    where = f"{job['hosts']} hosts with {job['workers']} workers each" if job["hosts"] > 1 else f"{job['workers']} workers of one host"
    scenario = written(schedule)
    return environment.from_string((_FILES / "page.html").read_text()).render(
        r=report,
        job=job,
        where=where,
        style=STYLE.read_text(),
        tiles=_tiles(report),
        families=drawing.FAMILY_NAMES.items(),
        phases=drawing.PHASES,
        timeline=drawing.timeline(report),
        incidents=drawing.incidents(report["incidents"]),
        stalls=drawing.stalls(report["stalls"]),
        again=f"elastic chaos replay {path}" if path else "elastic chaos run schedule.toml    # with the schedule below",
        shrunk=written(Schedule.from_json(report["shrunk"])) if report["shrunk"] else None,
        scenario=scenario,
    )


def _tiles(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    goodput, step_s = report["goodput"], report["step_s"]
    proven = sum(each["proof"] is not None for each in report["faults"])
    left_out = sum(each["proof"] is None and each["over"] for each in report["faults"]) if report["schedule"].get("drawn") else 0
    longest = max((each["seconds"] for each in report["stalls"]), default=0.0)
    return [
        (f"{report['steps']}", f"steps of {1000 * step_s:.0f} ms" if step_s else "steps"),
        (f"{proven} of {len(report['faults']) - left_out}", "faults took effect" + (f"; {left_out} left out" if left_out else "")),
        (f"{goodput['share']:.0%}" if goodput else "-", "goodput, of what the surviving workers allow"),
        (f"{longest:.2f} s", "longest stall"),
        (f"{len(report['incidents'])}", "incidents"),
        (f"{report['harness']['share']:.1%}" if report["harness"]["share"] is not None else "-", "of the machine taken by the harness"),
    ]
